"""What DeepSpeed is told, and what a user's own file may add."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vmamba_dist.config import ConfigError
from vmamba_dist.config.schema import ParallelConfig
from vmamba_dist.parallel import shares, zero_config
from vmamba_dist.parallel.shares import Layout

ROOT = Path(__file__).resolve().parents[2]


def config_of(
    theirs: object = None,
    folder: Path | None = None,
    compute: torch.dtype = torch.float32,
    device: str = "cpu",
    ranks: int = 2,
    **parallel: Any,
) -> dict[str, Any]:
    file = ""
    if folder is not None:
        path = folder / "ds.json"
        path.write_text(theirs if isinstance(theirs, str) else json.dumps(theirs))
        file = str(path)
    return zero_config.build_config(
        ParallelConfig(engine="deepspeed", deepspeed_config=file, **parallel),
        clip=3.0,
        compute=compute,
        device=torch.device(device),
        ranks=ranks,
        largest=1001,
        total=5000,
    )


def test_the_config_follows_from_the_run() -> None:
    config = config_of(zero_stage=3, compute=torch.bfloat16)
    assert config["gradient_clipping"] == 3.0
    assert config["torch_autocast"]["enabled"]
    assert "bf16" not in config  # it would cast the masters, and the recurrence with them
    assert config["zero_optimization"]["stage"] == 3
    assert config["zero_optimization"]["reduce_bucket_size"] == 5000
    assert config_of()["zero_optimization"]["stage"] == 2
    assert "offload_param" not in config_of(zero_stage=2, cpu_offload=True)["zero_optimization"]
    assert "offload_param" in config_of(zero_stage=3, cpu_offload=True)["zero_optimization"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_waits_for_the_device_only_where_it_must(stage: int, tmp_path: Path) -> None:
    """Where it measures no norm, nothing of it does: it would refuse gradient_clipping too. To overlap the exchange it
    waits once a step, and alone there is none."""
    for offload, ours in ((False, stage < 3), (True, False)):
        config = config_of(zero_stage=stage, cpu_offload=offload)
        assert zero_config.clips_on_device(config) == ours
        assert config["gradient_clipping"] == (0.0 if ours else 3.0)
        assert config["zero_optimization"].get("compute_grad_norm", True) != ours
    overlap = [
        config_of(zero_stage=stage, device="cuda", ranks=n)["zero_optimization"]["overlap_comm"]
        for n in (1, 2)
    ]
    assert overlap == [stage == 3, True]
    own = {"zero_optimization": {"overlap_comm": True, "offload_optimizer": {"device": "none"}}}
    config = config_of(own, tmp_path, zero_stage=stage, ranks=1)
    assert config["zero_optimization"]["overlap_comm"] is True
    assert zero_config.clips_on_device(config) == (stage < 3)


def test_alone_zero_2_is_zero_1(tmp_path: Path) -> None:
    """And no gradient is hooked or goes through a bucket, unless a file asks for it. On the host's way they all do."""
    own = {"zero_optimization": {"stage": 2, "overlap_comm": True}}
    for stage in (1, 2):
        zero = config_of(zero_stage=stage, ranks=1)["zero_optimization"]
        assert (zero["stage"], zero["contiguous_gradients"]) == (1, False)
    zero = config_of(own, tmp_path, ranks=1)["zero_optimization"]
    assert (zero["stage"], zero["overlap_comm"], "contiguous_gradients" in zero) == (1, True, False)
    for alone in (config_of(zero_stage=2, cpu_offload=True, ranks=1), config_of(ranks=2)):
        assert alone["zero_optimization"]["stage"] == 2
        assert "contiguous_gradients" not in alone["zero_optimization"]


def test_a_file_of_the_users_own_is_merged(tmp_path: Path) -> None:
    theirs = {
        "train_batch_size": "auto",
        "bf16": {"enabled": False},
        "fp16": {"enabled": "auto"},
        "gradient_clipping": 3,
        "steps_per_print": 50,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 5e7, "offload_optimizer": {"device": "none"}},
        "torch_autocast": {"lower_precision_safe_modules": ["torch.nn.Linear"]},
    }
    ours, merged = config_of(), config_of(theirs, tmp_path)
    assert merged["zero_optimization"]["reduce_bucket_size"] == 5e7
    assert merged["torch_autocast"]["lower_precision_safe_modules"] == ["torch.nn.Linear"]
    assert merged["steps_per_print"] == 50
    assert merged["zero_optimization"]["overlap_comm"] == ours["zero_optimization"]["overlap_comm"]
    assert not {"train_batch_size", "bf16", "fp16"} & merged.keys()


@pytest.mark.parametrize(
    ("theirs", "told"),
    [
        ({"train_batch_size": 64}, ["train_batch_size=64", "data.global_batch"]),
        ({"gradient_accumulation_steps": 4}, ["gradient_accumulation_steps=4", "micro_batch", " 1;"]),
        ({"gradient_clipping": 1.0}, ["gradient_clipping=1.0", "optim.clip", "3.0"]),
        ({"zero_optimization": {"stage": 3}}, ["stage=3", "parallel.zero_stage", "2"]),
        ({"zero_optimization": 3}, ["zero_optimization=3", "parallel.zero_stage"]),
        ({"zero_optimization": {"stage": {"a": 1}}}, ["stage.a=1", "parallel.zero_stage"]),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, ["'cpu'", "parallel.cpu_offload"]),
        ({"zero_optimization": {"zero_quantized_weights": True}}, ["quantized_weights=True", "not offered"]),
        ({"bf16": {"enabled": True}}, ["bf16.enabled=True", "precision.compute"]),
        ({"torch_autocast": {"enabled": True}}, ["enabled=True", "precision.compute", "False"]),
        ({"optimizer": {"type": "Adam", "params": {"lr": 1}}}, ["optimizer.type='Adam'", "optim.*"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["scheduler.type", "schedule.*"]),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, ["parallel.recompute"]),
        ({"zero_optimisation": {"stage": 2}}, ["zero_optimisation", "did you mean zero_optimization"]),
        ("{", ["this is no JSON"]),
        ([1], ["it holds a list"]),
    ],
    ids=lambda value: json.dumps(value)[:40] if not isinstance(value, list) else "",
)
def test_what_a_file_says_otherwise_is_named(theirs: object, told: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        config_of(theirs, tmp_path)
    assert [
        part for part in ["parallel.deepspeed_config", "ds.json", *told] if part not in str(error.value)
    ] == []


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.deepspeed_config='nowhere\.json': No such file"):
        zero_config.build_config(
            ParallelConfig(engine="deepspeed", deepspeed_config="nowhere.json"),
            clip=0.0,
            compute=torch.float32,
            device=torch.device("cpu"),
            ranks=1,
            largest=1,
            total=1,
        )


def test_zero_3_does_not_pretend_to_compile() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.compile='block': .*parallel\.zero_stage=2"):
        config_of(zero_stage=3, compile="block")
    config_of(zero_stage=2, compile="block")


def test_a_missing_package_is_told_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # as an import finds what is not installed
    monkeypatch.delitem(sys.modules, "vmamba_dist.parallel.deepspeed", raising=False)
    with pytest.raises(ConfigError, match=r"pip install 'vmamba-dist\[deepspeed\]'"):
        zero_config.load_engine(torch.device("cpu"))


def test_nothing_else_loads_deepspeed() -> None:
    code = "import sys, vmamba_dist.train.assemble as _; assert 'deepspeed' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120, env=_environment())


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}


def test_pieces_cover_a_tensor_once() -> None:
    """Three ranks with 5 elements each of a flat buffer, tensors of 4, 8 and 1 laid end to end in it."""
    assert shares.contiguous_cuts(0, 4, 5, 3) == ((0, 4), (0, 0), (0, 0))
    assert shares.contiguous_cuts(4, 8, 5, 3) == ((0, 1), (1, 5), (6, 2))
    assert shares.contiguous_cuts(12, 1, 5, 3) == ((0, 0), (0, 0), (0, 1))
    assert Layout((2, 4), shares.contiguous_cuts(4, 8, 5, 3), owner=0).numel == 8


def test_owners_share_what_there_is() -> None:
    sizes = {f"t{i}": size for i, size in enumerate((100, 60, 50, 40, 30, 20, 10, 1))}
    owners = shares.choose_owners(sizes, 3)
    held = [sum(size for name, size in sizes.items() if owners[name] == rank) for rank in range(3)]
    assert sum(held) == sum(sizes.values())
    assert max(held) <= sum(sizes.values()) / 3 + max(sizes.values()) / 3
    assert shares.choose_owners(sizes, 1) == dict.fromkeys(sizes, 0)
