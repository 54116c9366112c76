"""A study for TensorBoard: the losses of each size over samples, the plots and the report's text.

Law: a folder of events is whole when it has its name; it replaces the one before.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from vmamba_dist.scaling.analysis import Analysis
from vmamba_dist.scaling.fit import predict
from vmamba_dist.scaling.runs import RunRecord


def write_events(
    folder: Path, runs: Sequence[RunRecord], found: Analysis | None, plots: Mapping[str, bytes], text: str
) -> None:
    """Write the events of a study; steps are samples seen."""
    beside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    writer = SummaryWriter(str(beside))
    for run in runs:
        if run.finished and run.loss is not None:
            name = f"{run.model or f'{run.params:.4g} params'}/seed {run.seed}"
            writer.add_scalar(f"study/loss/{run.phase}/{name}", run.loss, int(run.samples))
            if found is not None:
                at = np.array([[run.params], [run.samples]])
                predicted = float(predict(found.law.value, at)[0])
                writer.add_scalar(f"study/law/{run.phase}/{name}", predicted, int(run.samples))
    for name, image in plots.items():
        pixels = np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))
        writer.add_image(f"study/{name}", pixels, dataformats="HWC")
    writer.add_text("study/report", text)
    writer.close()
    shutil.rmtree(folder, ignore_errors=True)
    beside.replace(folder)
