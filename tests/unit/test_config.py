"""A config is what defaults, YAML and words say, and nothing unknown or out of range gets in."""

import dataclasses
import typing
from pathlib import Path

import pytest

from vmamba_dist.config import Config, ConfigError, from_dict, load, to_dict, to_yaml, trajectory
from vmamba_dist.config.addresses import redact
from vmamba_dist.config.schema import SourceConfig

ROOT = Path(__file__).resolve().parents[2]


def test_words_win_over_yaml_and_yaml_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("optim: {lr: 2e-3, clip: 1}\nrun: {seed: 3}\n")
    cfg = load([f"config={file}", "run.seed=4"])
    assert (cfg.optim.lr, cfg.optim.clip, cfg.run.seed) == (2e-3, 1.0, 4)
    assert cfg.optim.weight_decay == Config().optim.weight_decay


def test_what_is_written_loads_to_the_same(tmp_path: Path) -> None:
    cfg = load(["augment.crop_scale=[0.2, 1]", "run.max_steps=7", "model.drop_path=0.1"])
    file = tmp_path / "b.yaml"
    file.write_text(to_yaml(cfg))
    assert load([f"config={file}"]) == cfg == from_dict(to_dict(cfg))


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("optim.rl=1", "optim.rl=1: unknown key; did you mean optim.lr?"),
        ("optmi.lr=1", "did you mean optim"),
        ("run=3", "run=3: this is a group"),
        ("optim.lr=abc", "optim.lr='abc': expected float"),
        ("optim.lr=.nan", "optim.lr=nan: give a finite number"),
        ("optim.lr=-1", "optim.lr=-1.0: use more than 0"),
        ("data.global_batch=3", "data.global_batch=3: use an even number"),
        ("data.image_size=33", "data.image_size=33: use a multiple of 4"),
        ("data.workers=true", "data.workers=True: expected int, got bool"),
        ("parallel.engine=zero", "parallel.engine='zero': choose one of ddp, fsdp, deepspeed"),
        ("augment.mean=[1,2]", "augment.mean=[1, 2]: give a list of 3 numbers"),
        ("lr", "'lr' is not key=value"),
        ("config=nowhere.yaml", "config=nowhere.yaml: no such file; shipped configs:"),
    ],
)
def test_a_mistake_names_the_key_the_value_and_the_fix(word: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load([word])
    assert says in str(caught.value)


def test_broken_yaml_is_a_config_error(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("optim: [1, 2\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        load([f"config={file}"])


def test_only_what_changes_the_trajectory_is_in_the_digest() -> None:
    def keys(word: str) -> set[str]:
        before, after = trajectory(Config()), trajectory(load([word]))
        return {k for k in before if before[k] != after[k]}

    assert keys("optim.lr=1") == {"optim.lr"}
    for word in ("run.dir=x", "run.max_steps=3", "data.workers=0", "parallel.recompute=block", "launch.nodes=1",
                 "telemetry.images=0", "checkpoint.keep=9", "eval.every_epochs=2", "data.train=elsewhere"):  # fmt: skip
        assert keys(word) == set(), word


def test_a_field_that_came_later_is_in_the_digest_only_where_it_is_set() -> None:
    """A checkpoint of an earlier version, which knows no such field, is still one of this config."""
    plain = trajectory(Config())
    for word in ("schedule.kind=wsd", "schedule.samples=640", "model.width=24", "model.depths=[1,1,2,1]"):
        key, _, _ = word.partition("=")
        assert key not in plain
        assert set(trajectory(load([word]))) - set(plain) == {key}


def test_lists_of_any_length_load_and_check_each_element() -> None:
    assert load(["study.widths=[8,16,24]"]).study.widths == (8, 16, 24)
    assert from_dict(to_dict(load(["study.lrs=[1e-3]"]))).study.lrs == (1e-3,)
    for word in ("study.widths=8", "study.widths=[8,x]", "study.models=vmamba_atto"):
        with pytest.raises(ConfigError, match=r"study\.(widths|models)"):
            load([word])


def test_every_group_and_field_is_documented_where_it_is_defined() -> None:
    source = (ROOT / "vmamba_dist/config/schema.py").read_text()
    for group, cls in typing.get_type_hints(Config).items():
        assert cls.__doc__, group
        for field in dataclasses.fields(cls):
            assert f"    {field.name}: " in source, (group, field.name)


@pytest.mark.parametrize("file", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_configs_load(file: Path) -> None:
    load([f"config={file}"])


def test_a_mixture_is_a_list_and_survives_the_run_directory(tmp_path: Path) -> None:
    sources = "data.train=[{path: a, weight: 3}, {path: 's3://b/x-{000..099}.tar'}]"
    mixture = load([sources])
    assert mixture.data.train == (SourceConfig("a", 3.0), SourceConfig("s3://b/x-{000..099}.tar", 1.0))
    file = tmp_path / "c.yaml"
    file.write_text(to_yaml(mixture))
    assert load([f"config={file}"]) == mixture
    assert load(["data.train=b"], base=to_dict(mixture)).data.train == "b"
    assert load([sources], base=to_dict(load(["data.train=b"]))) == mixture
    assert load(["data.train=x/y-{000..009}.tar"]).data.train == "x/y-{000..009}.tar"
    assert (
        load(["data.s3.endpoint_url=https://s3.example.org"]).data.s3.endpoint_url == "https://s3.example.org"
    )


@pytest.mark.parametrize(
    ("word", "says"),
    [
        (
            "data.train=https://me:hush@host/x",
            "data.train='https://…@host/x': a user or a password in an address",
        ),
        ("data.train=s3://AKIA:hush@bucket/x", "data.train='s3://…@bucket/x': a user or a password"),
        (
            "data.train=https://h/x?X-Amz-Signature=hush",
            "'https://h/x?…': a signed address (X-Amz-Signature=…)",
        ),
        ("data.train=https://h/x?a=1&sig=hush", "a signed address (sig=…)"),
        ("eval.data=https://h/x?access_token=hush", "eval.data='https://h/x?…': a signed address"),
        ("data.train=[{path: 'https://me:hush@h/x'}]", "data.train[].path='https://…@h/x'"),
        (
            "data.s3.endpoint_url=https://me:hush@h",
            "data.s3.endpoint_url='https://…@h': a user or a password",
        ),
        ("data.s3.secret_access_key=hush", "data.s3.secret_access_key: no key, and its value is not told"),
        ("data.s3.aws_session_token=hush", "data.s3.aws_session_token: no key"),
        ("data.trian=https://me:hush@host/x", "unknown key; did you mean data.train?"),
    ],
)
def test_no_credential_comes_from_a_config_and_none_is_told(word: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load([word])
    assert says in str(caught.value)
    assert "hush" not in str(caught.value) + repr(caught.value)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("data.train=[{path: a, wieght: 3}]", "data.train[0].wieght=3: unknown key"),
        ("data.train=[{weight: 3}]", "data.train[0].path is not set; an item has path, weight"),
        ("data.train=[{path: a, weight: 0}]", "data.train[].weight=0.0: use more than 0"),
        ("data.train=[]", "data.train=[]: a mixture needs a source"),
        ("data.train=[a]", "data.train[0]='a': give {path: …, weight: …}"),
        ("data.s3.endpoint_url=ftp://x", "data.s3.endpoint_url='ftp://x': give an address like https://"),
        ("data.s3.endpoint=x", "data.s3.endpoint='x': unknown key; did you mean data.s3.endpoint_url?"),
        ("data.cache_dir=s3://b/x", "data.cache_dir='s3://b/x': use a local folder"),
        ("data.cache_gib=0", "data.cache_gib=0.0: use more than 0 GiB"),
        ("data.read_attempts=0", "data.read_attempts=0: use 1 or more"),
        ("data.keep_index=no", "data.keep_index=False: choose one of run, beside"),
    ],
)
def test_a_mistake_about_sources_names_the_key(word: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load([word])
    assert says in str(caught.value)


def test_addresses_are_told_without_what_is_secret() -> None:
    told = redact("from https://me:pw@h:8/a.tar?sig=x, 's3://k:s@b/c' and http://h/d?x#y to file:///e?f (g)")
    assert told == "from https://…@h:8/a.tar?… 's3://…@b/c' and http://h/d?… to file:///e?… (g)"
