"""Training from where data really lies: a bucket, a web server, a mixture; killed, resumed, and telling no secret."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from distributed.micro import metrics, train, words
from distributed.world import world
from servers import BUCKET, KEY_ID, SECRET, s3, shelf, upload
from shardsets import make_set
from vmamba_dist.config import ConfigError
from vmamba_dist.config import load as load_config
from vmamba_dist.train.sources import open_sources

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a/set of 97 samples and b/set of 31."""
    folder = tmp_path_factory.mktemp("sources")
    make_set(folder / "a", 97)
    make_set(folder / "b", 31)
    return folder


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture(scope="module")
def endpoint(sets: Path) -> Iterator[str]:
    with s3() as url:
        upload(url, sets / "a" / "set", "a")
        yield url


def small(train_data: str, run_dir: Path, *more: str) -> list[str]:
    fields = ("data.global_batch=12", "data.block=4", "schedule.epochs=2", "eval.split=train")
    return [word for word in words(Path(), run_dir, *fields, *more) if not word.startswith("data.train=")] + [
        f"data.train={train_data}"
    ]


@pytest.mark.usefixtures("account")
def test_a_bucket_trains_as_a_folder_does_and_no_secret_is_written(
    sets: Path, endpoint: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The same losses, over a pause and a resume with readers and a cache; then every file of the run is searched."""
    train(small(f"{sets}/a/set", tmp_path / "local"))
    bucket = small(
        f"s3://{BUCKET}/a",
        tmp_path / "run",
        f"data.s3.endpoint_url={endpoint}",
        f"data.cache_dir={tmp_path}/cache",
        "telemetry.tensorboard=true",
    )
    assert train([*bucket, "run.max_steps=4"]) == "paused"
    assert train([*bucket, "data.workers=2"]) == "finished"
    assert metrics(tmp_path / "run") == metrics(tmp_path / "local")
    written = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
    printed = "".join(capfd.readouterr())
    for secret in (SECRET, KEY_ID, "X-Amz-Signature", "Authorization"):
        assert secret.encode() not in written
        assert secret not in printed


def test_a_mixture_trains_alike_at_every_world_size(sets: Path, tmp_path: Path) -> None:
    """One source from a web server, one from a folder; a resume at two ranks goes on in the same order."""
    with shelf(sets) as server:
        mixture = f"[{{path: '{server.url}/a/set', weight: 3}}, {{path: '{sets}/b/set', weight: 1}}]"
        alone = small(mixture, tmp_path / "alone")
        assert train(alone) == "finished"
        both = small(mixture, tmp_path / "both")
        assert train([*both, "run.max_steps=6"]) == "paused"
        assert set(world(2).run(train, both, timeout_s=240)) == {"finished"}
    one, two = metrics(tmp_path / "alone"), metrics(tmp_path / "both")
    assert [line["step"] for line in one] == [line["step"] for line in two] == list(range(1, 21))
    for a, b in zip(one, two, strict=True):
        assert abs(a["loss"] - b["loss"]) <= 1e-4 * abs(a["loss"])


def test_other_weights_are_another_trajectory(sets: Path, tmp_path: Path) -> None:
    def mixture(weight: int) -> str:
        return f"[{{path: '{sets}/a/set', weight: {weight}}}, {{path: '{sets}/b/set'}}]"

    assert train([*small(mixture(3), tmp_path / "run"), "run.max_steps=4"]) == "paused"
    with pytest.raises(ConfigError, match=r"data\.train \(content\) was"):
        train(small(mixture(2), tmp_path / "run"))


def test_a_mixture_is_checked_before_it_trains(sets: Path, tmp_path: Path) -> None:
    for path, words_ in (
        (f"{sets}/nowhere", r"data\.train\[1\]\.path='.*nowhere' has no _info\.json"),
        (f"{sets}/a/set/x-{{0..3}}.tar", r"data\.train\[1\]\.path=.* 4 of its 4 shards are missing"),
    ):
        cfg = load_config(small(f"[{{path: '{sets}/a/set'}}, {{path: '{path}'}}]", tmp_path / "run"))
        with pytest.raises(ConfigError, match=words_):
            open_sources(cfg, 1)
