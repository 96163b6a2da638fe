"""The command line: what goes to stdout, what to stderr, and which exit code says what."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from command import TINY, rpac

import rpac as package
from rpac import build as job
from rpac.build import GENERATED_MARK
from rpac.cli import main
from rpac.errors import PlanError, TargetError
from rpac.plan import KIND_ORDER, plan_spec
from rpac.plan.cache_memory import CacheMemory
from rpac.plan.words import decisions
from rpac.spec import load_spec

Tree = Callable[[Path], dict[str, bytes]]
Built = Callable[[str], Path]


def test_help_lists_the_commands_and_the_exit_codes(tmp_path: Path) -> None:
    for flag in ("-h", "--help"):
        done = rpac(flag, cache=tmp_path)
        assert done.returncode == 0
        for word in ("plan", "build", "inspect", "generate", "Exit codes: 0 done, 1 a check failed, 2 bad spec"):
            assert word in done.stdout


@pytest.mark.parametrize("command", ["plan", "build", "inspect", "generate", "tune", "bench"])
def test_every_command_explains_itself(command: str, tmp_path: Path) -> None:
    done = rpac(command, "--help", cache=tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith(f"Usage: python -m rpac.cli {command} ")


def test_the_version_is_the_packages(tmp_path: Path) -> None:
    assert rpac("--version", cache=tmp_path).stdout == f"rpac, version {package.__version__}\n"


def test_plan_prints_a_row_a_source(tmp_path: Path) -> None:
    done = rpac("plan", TINY, "--target", "v6e", "--target", "cpu", cache=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    header, _, *rows = done.stdout.partition("\n\n")[0].splitlines()
    assert header.startswith("source ")
    spec = load_spec(TINY)
    assert [row.split()[0] for row in rows] == [
        plan.path for target in ("v6e", "cpu") for plan in plan_spec(spec, target)
    ]
    for word in ("VMEM need", "limit", "SMEM need", "token buckets", "tiles from"):
        assert word in header


LARGE = """\
name: large
model: {q_heads: 32, kv_heads: 32, head_dim: 128, q_dtype: bfloat16, kv_dtype: bfloat16}
serving:
  page_size: 512
  max_model_len: 4096
  max_num_tokens: 512
  token_buckets: [512]
  max_num_seqs: 8
  prefill_chunk: 256
  context_lens: [1024]
targets: [tpu7x, v5e, cpu]
"""  # fits no tpu7x


def test_plan_prints_the_other_targets_where_one_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "large.yaml"
    file.write_text(LARGE)
    done = rpac("plan", file, cache=tmp_path)
    assert done.returncode == PlanError.exit_code
    assert re.match(
        rf"rpac: PlanError: {file}: no prefill kernel fits tpu7x: .*; write `page_size: 256`\n\Z", done.stderr
    )
    _, _, *rows = done.stdout.partition("\n\n")[0].splitlines()
    assert [row.split()[0] for row in rows] == [
        f"{target}/{kind}.py" for target in ("v5e", "cpu") for kind in KIND_ORDER
    ]
    done = rpac("plan", file, "--json", cache=tmp_path)
    assert done.returncode == PlanError.exit_code
    found = json.loads(done.stdout)
    assert {one["target"] for one in found["plans"]} == {"v5e", "cpu"}
    assert list(found["refused"]) == ["tpu7x"]
    assert "no prefill kernel fits tpu7x" in found["refused"]["tpu7x"]


@pytest.mark.parametrize(
    "command",
    [["build", "-o", "out"], ["check"], ["predict", "--target", "v5e", "--target", "tpu7x"]],
    ids=lambda command: command[0],
)
def test_a_target_that_is_refused_stops_the_others_before_anything_compiles(command: list[str], tmp_path: Path) -> None:
    file = tmp_path / "large.yaml"
    file.write_text(LARGE)
    done = rpac(command[0], file, *command[1:], cache=tmp_path / "cache", cwd=tmp_path)
    assert done.returncode == PlanError.exit_code
    assert "no prefill kernel fits tpu7x" in done.stderr
    assert "compil" not in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()


def test_plan_shows_what_the_cache_takes_of_hbm(tmp_path: Path) -> None:
    text = (
        TINY.read_text().replace("kv_heads: 2", "kv_heads: 1").replace("kv_dtype: bfloat16", "kv_dtype: float8_e4m3fn")
    )
    (tmp_path / "one.yaml").write_text(text.replace("page_size: 16", "page_size: 32"))
    done = rpac("plan", tmp_path / "one.yaml", "--target", "v5e", "--target", "cpu", cache=tmp_path)
    assert done.returncode == 0, done.stderr
    _, memory, notes, *_ = done.stdout.split("\n\n")
    header, _, *rows = memory.splitlines()
    assert header.split("  ")[0] == "target"
    assert [" ".join(row.split()) for row in rows] == [
        "v5e 5 4 / 1 16 KiB 50% 64 1.00 MiB 0.0% 15.75 GiB",
        "cpu 5 4 / 1 16 KiB 50% 64 1.00 MiB - -",
    ]
    assert notes.splitlines() == [
        "The cache is that of one layer: each layer of a model has one, and its weights need room too.",
        "50% of the cache is padding, because a token's rows (2 of float8_e4m3fn) fill whole words of 4: "
        "`kv_layout: separate` takes 8,192 bytes less a page.",
    ]


@pytest.mark.parametrize("command", ["plan", "build"])
def test_a_cache_larger_than_hbm_is_refused_before_anything_compiles(command: str, tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY.read_text().replace("serving:\n", "serving:\n  num_pages: 10000000\n"))
    done = rpac(command, file, "--target", "v5e", cache=tmp_path / "cache", cwd=tmp_path)
    assert done.returncode == PlanError.exit_code
    assert "serving.num_pages: found 10000000, so that one layer's cache takes 163,840,000,000 bytes" in done.stderr
    assert "compil" not in done.stderr
    assert list(tmp_path.iterdir()) == [file]


def test_plan_shows_the_groups_of_a_decode_kernel_where_k_and_v_lie_apart(tmp_path: Path) -> None:
    text = TINY.read_text().replace("  page_size: 16\n", "  page_size: 16\n  kv_layout: separate\n")
    (tmp_path / "apart.yaml").write_text(text)
    done = rpac("plan", tmp_path / "apart.yaml", "--target", "tpu7x", cache=tmp_path)
    assert done.returncode == 0, done.stderr
    decode, prefill, *mixed = done.stdout.partition("\n\n")[0].splitlines()[2:]
    assert re.fullmatch(r"tpu7x/decode\.py +8 32 +4 x 128 x6 +- .* rule", decode.strip())
    assert re.fullmatch(r"tpu7x/prefill\.py +32 +- +16 q, 128/128 x3 .* rule", prefill.strip())
    assert all(re.search(r" 4 x 128 x6 +\d+ q, ", row) for row in mixed)


def test_plan_tells_the_recipe_of_each_program_in_words(tmp_path: Path) -> None:
    done = rpac("plan", TINY, "--target", "tpu7x", "--target", "cpu", cache=tmp_path)
    _, _, _, *recipes = done.stdout.split("\n\n")  # tables of tiles and of memory, and what the latter does not say
    paths = [path for recipe in recipes for path in recipe.partition(":\n")[0].split(", ")]
    plans = [plan for target in ("tpu7x", "cpu") for plan in plan_spec(load_spec(TINY), target)]
    assert sorted(paths) == sorted(plan.path for plan in plans)
    for plan in plans:
        (told,) = (one for one in recipes if plan.path in one.partition(":\n")[0].split(", "))
        assert told.strip().splitlines()[1:] == [f"- {one}" for one in decisions(plan.recipe, plan.kind)]


def test_plan_as_json_is_the_plans(tmp_path: Path) -> None:
    done = rpac("plan", TINY, "--json", cache=tmp_path)
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    spec = load_spec(TINY)
    plans = [plan.as_dict() for target in spec.targets for plan in plan_spec(spec, target)]
    memory = [{**CacheMemory.of(spec, target).as_dict(), "programs": 5} for target in spec.targets]
    assert data == {
        "spec": "tiny",
        "spec_hash": spec.hash,
        "plans": json.loads(json.dumps(plans)),
        "memory": memory,
        "refused": {},
    }
    for plan in data["plans"]:
        assert plan["vmem_need"] <= plan["vmem_limit"] <= plan["vmem_bytes"]
        assert plan["smem_need"] <= plan["smem_bytes"]


def test_build_as_json_keeps_stdout_clean_and_progress_on_stderr(built: Built, cache: Path, tmp_path: Path) -> None:
    built("cpu")
    done = rpac("build", TINY, "--target", "cpu", "-o", "out", "--json", cache=cache, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["bundle"] == "out/tiny.rpac"
    assert data["spec_hash"] == load_spec(TINY).hash
    assert len(data["variants"]) == 5
    for variant in data["variants"]:
        assert variant["target"] == "cpu"
        assert variant["exported_bytes"] > 0
        assert variant["executable_bytes"] is None
        assert (tmp_path / "out" / "tiny.rpac" / "source" / variant["source"]).is_file()
    first, *lines, canaries, last = done.stderr.splitlines()
    assert first.endswith(" s  tiny: planning the kernels for cpu")
    assert [line[:7] for line in lines] == [f"[  {count}/5]" for count in range(1, 6)]
    assert {line.split("s  ")[1] for line in lines} == {
        f"cpu {variant['kind']} t{variant['tokens']}: cached" for variant in data["variants"]
    }
    assert canaries.endswith(" s  tiny: computing the canaries' expected answers")
    assert last.endswith(" s  out/tiny.rpac: writing the bundle")


def test_build_says_what_it_does_before_it_does_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []

    def planning(*_: object) -> None:
        said.append(capsys.readouterr().err)
        raise TargetError("enough")

    monkeypatch.setattr(job, "all_tasks", planning)
    with pytest.raises(SystemExit):
        main(["build", str(TINY), "--target", "cpu"])
    assert re.fullmatch(r" +\d+\.\d s  tiny: planning the kernels for cpu\n", said[0])


def test_build_prints_a_row_a_program_and_where_the_bundle_is(built: Built, cache: Path, tmp_path: Path) -> None:
    built("cpu")
    done = rpac("build", TINY, "--target", "cpu", "--target", "cpu", cache=cache, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    assert len(table) == 2 + 5
    assert last.startswith("build/tiny.rpac: 5 programs in ")


def test_inspect_says_what_is_in_a_bundle(built: Built, cache: Path) -> None:
    done = rpac("inspect", built("cpu"), cache=cache)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"tiny  spec {load_spec(TINY).hash[:16]}  ")
    assert "every hash matches" in done.stdout
    assert "; K and V interleaved in 128 pages of 16, 32 for each of 4 sequences, " in done.stdout
    data = json.loads(rpac("inspect", built("cpu"), "--json", cache=cache).stdout)
    assert list(data["targets"]) == ["cpu"]
    assert f"digest {data['digest']}\n" in done.stdout
    assert data["size"] == sum(file.stat().st_size for file in built("cpu").rglob("*") if file.is_file())


@pytest.mark.parametrize("what", ["blobs", "source", "spec.yaml", "manifest.json"])
@pytest.mark.parametrize("options", [[], ["--json"]], ids=["text", "json"])
def test_inspect_finds_a_flipped_byte_anywhere(
    built: Built, cache: Path, tmp_path: Path, what: str, options: list[str]
) -> None:
    bundle = tmp_path / "tiny.rpac"
    shutil.copytree(built("cpu"), bundle)
    file = max([bundle / what, *(bundle / what).rglob("*")], key=lambda path: path.is_file())
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    done = rpac("inspect", bundle, *options, cache=cache)
    assert done.returncode == 4
    assert done.stdout == ""
    assert done.stderr.startswith("rpac: BundleError: ")
    assert "Traceback" not in done.stderr


def test_generate_writes_the_kernels_and_compiles_nothing(tmp_path: Path, tree: Tree) -> None:
    done = rpac("generate", TINY, "-o", tmp_path / "out", cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    found = tree(tmp_path / "out")
    assert f"tiny/{GENERATED_MARK}" in found
    assert f"{tmp_path / 'out' / 'tiny'}: {len(found) - 1} sources\n" == done.stdout
    assert {name.split("/")[1] for name in found} == {*load_spec(TINY).targets, GENERATED_MARK}
    assert not (tmp_path / "cache").exists()
    stale = tmp_path / "out" / "tiny" / "cpu" / "removed.py"
    stale.touch()
    assert rpac("generate", TINY, "-o", tmp_path / "out", cache=tmp_path).returncode == 0
    assert not stale.exists()


SPEC_COMMANDS = ["plan", "build", "generate"]


def refused(code: int, *args: object, cwd: Path) -> str:
    """The one report on stderr of a command that must exit with `code`."""
    before = set(cwd.rglob("*"))
    done = rpac(*args, cache=cwd / "cache", cwd=cwd)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert set(cwd.rglob("*")) == before
    return done.stderr


@pytest.mark.parametrize("command", SPEC_COMMANDS)
def test_a_spec_that_is_not_there_is_exit_2(command: str, tmp_path: Path) -> None:
    message = refused(2, command, "none.yaml", cwd=tmp_path)
    assert message == (
        "rpac: SpecError: none.yaml: found a file that cannot be read (No such file or directory); "
        "must be a readable YAML file; check the path\n"
    )


@pytest.mark.parametrize("command", SPEC_COMMANDS)
def test_a_spec_that_cannot_be_read_is_exit_2(command: str, tmp_path: Path) -> None:
    assert "(Is a directory)" in refused(2, command, ".", cwd=tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"name: \xff\n")
    assert "bytes.yaml:1:7: found byte 0xff; must be UTF-8" in refused(2, command, "bytes.yaml", cwd=tmp_path)


def test_every_problem_of_a_spec_is_reported_with_its_place(tmp_path: Path) -> None:
    text = TINY.read_text().replace("head_dim: 128", "head_dim: 100").replace("page_size: 16", "page_size: 17")
    (tmp_path / "bad.yaml").write_text(text)
    message = refused(2, "build", "bad.yaml", "--json", cwd=tmp_path)
    lines = message.splitlines()
    assert [line.removeprefix("rpac: SpecError: ").split(":")[0] for line in lines] == ["bad.yaml"] * len(lines)
    assert "model.head_dim: found 100; must be 64, 80, 96, 112, 128, 192 or 256" in message
    assert "serving.page_size: found 17" in message


@pytest.mark.parametrize("command", ["plan", "build"])
def test_a_target_that_the_spec_lacks_is_exit_3(command: str, tmp_path: Path) -> None:
    text = TINY.read_text().replace("targets: [tpu7x, v6e, v5p, v5e, cpu]", "targets: [v6e, cpu]")
    (tmp_path / "two.yaml").write_text(text)
    message = refused(3, command, "two.yaml", "--target", "v5p", cwd=tmp_path)
    assert message.startswith(
        "rpac: TargetError: two.yaml: target 'v5p' is not in the spec, which has v6e, cpu; add it to targets"
    )


@pytest.mark.parametrize("command", ["plan", "build"])
def test_a_target_that_nobody_has_is_a_mistake_in_usage(command: str, tmp_path: Path) -> None:
    message = refused(2, command, TINY, "--target", "v7", cwd=tmp_path)
    assert "'v7' is not one of 'tpu7x', 'v6e', 'v5p', 'v5e', 'cpu'" in message


@pytest.mark.parametrize(
    "args",
    [
        ["build"],
        ["build", TINY, "--jobs", "0"],
        ["plan", TINY, "more"],
        ["nothing"],
        *(["build", TINY, "--wait", seconds] for seconds in ("x", "-1", "-inf", "nan")),
        *(["tune", TINY, "--budget", minutes] for minutes in ("-1", "nan")),
        ["check", TINY, "--seed", "-1"],
        ["serve-check", TINY, "--target", "cpu", "--target", "v6e"],
        ["build", TINY, "-o", "a", "--out", "b"],
    ],
    ids=lambda args: " ".join(map(str, args[-2:])),
)
def test_mistakes_in_usage_are_exit_2(args: list[object], tmp_path: Path) -> None:
    assert "Usage: " in refused(2, *args, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_that_is_not_there_is_exit_4(tmp_path: Path) -> None:
    assert refused(4, "inspect", "none.rpac", cwd=tmp_path).startswith("rpac: BundleError: none.rpac: found no folder")
    (tmp_path / "empty.rpac").mkdir()
    assert "manifest.json: cannot be read" in refused(4, "inspect", "empty.rpac", cwd=tmp_path)


@pytest.mark.parametrize("command", ["build", "generate"])
def test_output_that_cannot_be_written_is_exit_5(command: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = refused(5, command, TINY, "-o", "file", cwd=tmp_path)
    last = message.splitlines()[-1]
    assert last.startswith("rpac: OutputError: ")
    assert "nothing was published" in last


@pytest.mark.parametrize(("command", "name"), [("build", "tiny.rpac"), ("generate", "tiny")])
def test_a_folder_of_somebody_else_is_never_replaced(command: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("the only copy")
    message = refused(5, command, TINY, "-o", ".", cwd=tmp_path)
    assert (
        f"{name}: found a folder that this command did not make, with thesis.txt; must be absent, empty or an"
        in message
    )
    assert (tmp_path / name / "thesis.txt").read_text() == "the only copy"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_exit_5(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "Permission denied" in refused(5, "build", TINY, "-o", "locked", cwd=tmp_path)
