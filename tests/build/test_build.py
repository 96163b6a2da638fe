"""From a spec to a bundle on disk, for cpu: what it serves, what a rebuild costs, and what happens to one that is stopped."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from command import ROOT, RPAC, TINY, environment, rpac, start

from rpac.build import GENERATED_MARK, sources_of
from rpac.bundle import verify_bundle
from rpac.spec import load_spec

Tree = Callable[[Path], dict[str, bytes]]
Built = Callable[[str], Path]
PROGRAMS = 5  # of tiny for one target

# Serves steps of ragged batches on the bundle argv[1] and holds each against the oracle. The cache goes from call to
# call; whatever no sequence wrote in it is NaN, each with bits of its own.
SERVE = """
import json, sys
touched = []
def watch(event, args):
    if event == "open" and isinstance(args[0], str) and ("source/" in args[0] or args[0].endswith(".jinja")):
        touched.append(args[0])
    if event == "exec" and "ragged_paged_attention" in getattr(args[0], "co_names", ()) and args[0].co_name == "<module>":
        touched.append(args[0].co_filename)

import jax, jax.numpy as jnp, ml_dtypes, numpy as np, rpac
from rpac.oracle.attention import ragged_paged_attention as oracle
seen = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: seen.append(event) if event.startswith("/jax/core/compile/") else None)
sys.addaudithook(watch)
engine = rpac.load(sys.argv[1])
at_load = list(seen)
model, limits = engine.model, engine.limits

rng = np.random.default_rng(7)
dims = engine.programs[rpac.Variant("decode", limits.token_buckets[0])].args[3]
bits = rng.integers(0x7FC0, 0x8000, dims.shape, np.uint16)
kv_cache = jnp.asarray(bits.view(ml_dtypes.bfloat16))
free = rng.permutation(limits.num_pages).tolist()
tables = [[free.pop() for _ in range(limits.pages_per_seq)] for _ in range(limits.max_num_seqs)]
cached = [0] * limits.max_num_seqs
steps = [
    {0: 16, 1: 16},  # two chunks, each a whole page
    {2: 15, 3: 5},  # mixed, up to one before the page's end
    {0: 1, 1: 1, 2: 1, 3: 1},  # decode: first of a page, last of a page
    {3: 1, 2: 1},
    {0: 16, 2: 1, 3: 9},  # a chunk, a decode row and the rest, in one batch
    {1: 31},  # mixed over a page boundary
    {1: 1, 0: 4},
    {3: 16},
    {},
]
left = limits.max_kv_len - sum(step.get(1, 0) for step in steps)
steps += [{1: min(32, left - 1 - at)} for at in range(0, left - 1, 32)] + [{1: 1}]  # to the last token of the table
report = []
for step in steps:
    batch = rpac.Batch.build(limits, list(step.values()), [cached[s] for s in step], [tables[s] for s in step])
    queries, keys, values = (rng.uniform(-1, 1, (batch.tokens, heads, model.head_dim)).astype(ml_dtypes.bfloat16)
                             for heads in (model.q_heads, model.kv_heads, model.kv_heads))
    metadata = batch.kv_lens, batch.page_indices, batch.cu_q_lens, batch.distribution
    want, want_cache = oracle(queries, keys, values, np.asarray(kv_cache), *metadata, sm_scale=model.sm_scale)
    out, kv_cache = engine(queries, keys, values, kv_cache, *metadata)
    real = slice(0, batch.num_tokens)
    error = np.abs(np.asarray(out, np.float32)[real] - want[real]).max(initial=0)
    same = bool((np.asarray(kv_cache).view(np.uint16) == want_cache.view(np.uint16)).all())
    report.append([batch.kind, batch.tokens, float(error), same])
    for sequence, new in step.items():
        cached[sequence] += new
full = max(cached) == limits.max_kv_len
print(json.dumps({"at_load": at_load, "touched": touched, "steps": report, "full": full}))
"""
# Queries and values are below 1, so the output is: rounding it to bfloat16 costs up to 2**-9, rounding the
# probabilities on the way as much again.
TOLERANCE = 2.0**-8


def progress(stderr: str) -> list[str]:
    """What became of each variant, as the progress lines say: "cached" or "compiled"."""
    said = [line.rsplit(": ", 1)[1] for line in stderr.splitlines() if line.startswith("[")]
    return [what for what in said if what in ("cached", "compiled")]


def state_and_parent(pid: str) -> tuple[str, str] | None:
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[:2]
    except (FileNotFoundError, ProcessLookupError):
        return None
    return state, parent


def alive(pids: Iterable[str]) -> list[str]:
    return [pid for pid in pids if (found := state_and_parent(pid)) is not None and found[0] != "Z"]


def children_of(parent: int) -> list[str]:
    pids = [path.name for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [pid for pid in pids if (found := state_and_parent(pid)) is not None and found[1] == str(parent)]


def half_way(*args: object, cache: Path, spec: Path = TINY, interrupts: str = "") -> subprocess.Popen[str]:
    """A build for cpu of which one variant is compiled and the others are not; `interrupts` as `start` has it."""
    process = start("build", spec, "--target", "cpu", "--jobs", 1, *args, cache=cache, interrupts=interrupts)
    assert process.stderr is not None
    for line in process.stderr:
        if line.endswith(": compiled\n"):
            return process
    raise AssertionError("the build ended before it had compiled a program")


def test_a_bundle_serves_what_the_oracle_says_in_another_process(built: Built, tmp_path: Path) -> None:
    bundle = tmp_path / "moved" / "tiny.rpac"
    shutil.copytree(built("cpu"), bundle)
    done = subprocess.run(
        [sys.executable, "-c", SERVE, str(bundle)], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["at_load"] == []  # nothing is traced, lowered or compiled
    assert report["touched"] == []  # no kernel's source and no template is read or run
    assert {(kind, tokens) for kind, tokens, *_ in report["steps"]} == {
        ("decode", 8), ("prefill", 32), ("mixed", 8), ("mixed", 32)
    }  # fmt: skip
    assert [step for step in report["steps"] if not step[2] <= TOLERANCE] == []
    assert [step for step in report["steps"] if not step[3]] == []
    assert report["full"]


def test_a_bundle_is_whole_and_says_what_it_is(built: Built) -> None:
    manifest = verify_bundle(built("cpu"))
    spec = load_spec(TINY)
    assert (manifest.name, manifest.spec_hash) == ("tiny", spec.hash)
    assert (built("cpu") / "spec.yaml").read_text() == TINY.read_text()
    (target,) = manifest.targets.values()
    assert sorted(map(str, (program.variant for program in target.programs))) == [
        "decode/32", "decode/8", "mixed/32", "mixed/8", "prefill/32"
    ]  # fmt: skip
    assert all(program.executable is None and program.exported.size < 300_000 for program in target.programs)
    assert all((built("cpu") / "source" / program.source).is_file() for program in target.programs)


def test_a_rebuild_compiles_nothing_and_is_identical(built: Built, cache: Path, tmp_path: Path, tree: Tree) -> None:
    first = tree(built("cpu"))
    done = rpac("build", TINY, "--target", "cpu", "-o", tmp_path, "--json", cache=cache)
    assert done.returncode == 0, done.stderr
    assert progress(done.stderr) == ["cached"] * PROGRAMS
    assert json.loads(done.stdout)["seconds"] < 2
    assert tree(tmp_path / "tiny.rpac") == first
    again = rpac("build", TINY, "--target", "cpu", "-o", tmp_path, cache=cache)  # in its own place
    assert again.returncode == 0, again.stderr
    assert tree(tmp_path / "tiny.rpac") == first


@pytest.mark.parametrize(
    "name",
    [
        b'a"""\nimport os\nos.abort()\n""".yaml',
        b"a\\.yaml",
        b"{{ x }} {% raw %}'.yaml",
        "\u65e5\u672c\u8a9e.yaml".encode(),
        b"\xff\xfe.yaml",
    ],
    ids=ascii,
)
def test_the_name_of_a_specs_file_is_in_no_bundle(
    built: Built, cache: Path, tmp_path: Path, tree: Tree, name: bytes
) -> None:
    copied = tmp_path / os.fsdecode(name)
    shutil.copy(TINY, copied)
    wanted = tree(built("cpu"))
    done = rpac("build", copied, "--target", "cpu", "-o", tmp_path / "out", cache=cache)
    assert done.returncode == 0, done.stderr
    assert progress(done.stderr) == ["cached"] * PROGRAMS
    assert tree(tmp_path / "out" / "tiny.rpac") == wanted


def test_neither_the_place_nor_the_users_settings_change_a_bundle(built: Built, tmp_path: Path, tree: Tree) -> None:
    """Built again from nothing: in another folder, from a copy of the spec, in an environment that would show."""
    copied = tmp_path / "elsewhere" / "tiny.yaml"
    copied.parent.mkdir()
    shutil.copy(TINY, copied)
    done = rpac(
        "build", "elsewhere/tiny.yaml", "--target", "cpu", "-o", "out", "--jobs", 1,
        cache=tmp_path / "cache",
        cwd=tmp_path,
        env={
            "PYTHONHASHSEED": "3",
            "TZ": "Pacific/Auckland",
            "HOME": str(tmp_path),
            "JAX_ENABLE_X64": "1",
            "JAX_DEFAULT_MATMUL_PRECISION": "highest",
            "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "10",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=3",
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert progress(done.stderr) == ["compiled"] * PROGRAMS
    assert tree(tmp_path / "out" / "tiny.rpac") == tree(built("cpu"))
    assert not [name for name, data in tree(tmp_path / "out").items() if str(tmp_path).encode() in data]


def test_damaged_cache_entries_are_made_anew(built: Built, cache: Path, tmp_path: Path, tree: Tree) -> None:
    built("cpu")
    own = tmp_path / "cache"
    shutil.copytree(cache, own)
    # As many entries as tiny's programs for cpu, each damaged in its own way; other targets' entries stay as they are.
    entries = [entry for entry in sorted(own.glob("??/*")) if b'"device_kind": "cpu"' in b"".join(tree(entry).values())]
    assert len(entries) == PROGRAMS
    files = [sorted(path for path in entry.iterdir()) for entry in entries]
    flipped = bytearray(files[0][0].read_bytes())
    flipped[len(flipped) // 2] ^= 1
    files[0][0].write_bytes(flipped)
    files[1][0].unlink()
    files[2][-1].unlink()
    for file in files[3]:
        file.write_bytes(file.read_bytes()[:-1])
    os.truncate(files[4][0], 0)
    for expected in ("compiled", "cached"):
        done = rpac("build", TINY, "--target", "cpu", "-o", tmp_path, cache=own)
        assert done.returncode == 0, done.stderr
        assert progress(done.stderr) == [expected] * PROGRAMS
        assert tree(tmp_path / "tiny.rpac") == tree(built("cpu"))


def test_a_cache_that_cannot_be_written_fails_no_build(built: Built, tmp_path: Path, tree: Tree) -> None:
    file = tmp_path / "file"
    file.touch()
    done = rpac("build", TINY, "--target", "cpu", "-o", tmp_path, cache=file / "cache")
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "tiny.rpac") == tree(built("cpu"))


def test_no_cache_keeps_nothing(tmp_path: Path) -> None:
    done = rpac("build", TINY, "--target", "cpu", "-o", tmp_path / "out", "--no-cache", cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("earlier", [False, True], ids=["first", "over an earlier bundle"])
def test_a_build_killed_half_way_leaves_no_half_bundle(
    earlier: bool, built: Built, cache: Path, tmp_path: Path, tree: Tree
) -> None:
    bundle = tmp_path / "out" / "tiny.rpac"
    if earlier:
        shutil.copytree(built("cpu"), bundle)
    process = half_way("-o", tmp_path / "out", "--no-cache", cache=tmp_path)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert bundle.exists() == earlier
    if earlier:
        assert tree(bundle) == tree(built("cpu"))
    done = rpac("build", TINY, "--target", "cpu", "-o", tmp_path / "out", cache=cache)
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "out") == {f"tiny.rpac/{name}": data for name, data in tree(built("cpu")).items()}


def test_what_a_killed_build_had_compiled_is_not_compiled_again(tmp_path: Path) -> None:
    process = half_way("-o", tmp_path, cache=tmp_path / "cache")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    done = rpac("build", TINY, "--target", "cpu", "-o", tmp_path, cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert progress(done.stderr).count("cached") >= 1


def test_the_workers_of_a_killed_build_end_with_it(tmp_path: Path) -> None:
    process = half_way("-o", tmp_path, "--no-cache", cache=tmp_path)
    children = children_of(process.pid)
    assert alive(children)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 30
    while alive(children) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert alive(children) == []


def test_an_interrupted_build_leaves_nothing_and_no_traceback(tmp_path: Path) -> None:
    # A long build, that is still under way when a busy machine comes to interrupt it.
    spec = TINY.with_name("llama3-8b.yaml")
    process = half_way("-o", tmp_path / "out", "--no-cache", cache=tmp_path, spec=spec, interrupts="SIG_DFL")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, stderr = process.communicate()
    assert process.returncode == 130
    assert stderr.endswith("rpac: interrupted\n")
    assert "Traceback" not in stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_a_build_that_a_shell_started_in_the_background_is_not_interrupted(tmp_path: Path) -> None:
    process = half_way("-o", tmp_path / "out", "--no-cache", cache=tmp_path, interrupts="SIG_IGN")
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert (tmp_path / "out" / "tiny.rpac" / "manifest.json").is_file()


def test_of_two_builds_into_one_folder_the_later_fails_or_waits(
    built: Built, cache: Path, tmp_path: Path, tree: Tree
) -> None:
    built("cpu")  # so that the later one has nothing to compile
    first = half_way("-o", tmp_path, "--no-cache", cache=cache)
    os.kill(first.pid, signal.SIGSTOP)  # it stays half way for as long as this takes
    try:
        refused = rpac("build", TINY, "--target", "cpu", "-o", tmp_path, cache=cache)
        assert refused.returncode == 5
        assert f"another process ({first.pid}) is writing this folder" in refused.stderr.replace("pid ", "")
        assert "Traceback" not in refused.stderr
        waiting = start("build", TINY, "--target", "cpu", "-o", tmp_path, "--wait", 120, cache=cache)
        time.sleep(1)
        assert waiting.poll() is None
    finally:
        os.kill(first.pid, signal.SIGCONT)
    for process in (first, waiting):
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr
    assert tree(tmp_path) == {f"tiny.rpac/{name}": data for name, data in tree(built("cpu")).items()}


def test_a_full_disk_is_exit_5_and_the_earlier_bundle_stays(
    built: Built, cache: Path, tmp_path: Path, tree: Tree
) -> None:
    """A limit on file sizes stands in for the disk's end: writes fail part-way in the same way."""
    bundle = tmp_path / "tiny.rpac"
    shutil.copytree(built("cpu"), bundle)
    largest = max(map(len, tree(bundle).values()))

    limited = f"""
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, ({largest - 1}, resource.RLIM_INFINITY))
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
    command = [sys.executable, "-c", limited, *RPAC[1:], "build", str(TINY), "--target", "cpu", "-o", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment(cache))
    assert done.returncode == 5
    assert f"cannot be written ({os.strerror(errno.EFBIG)}); nothing was published" in done.stderr
    assert "Traceback" not in done.stderr
    assert tree(tmp_path) == {f"tiny.rpac/{name}": data for name, data in tree(built("cpu")).items()}


def test_a_cache_on_a_full_disk_fails_no_build(tmp_path: Path, built: Built, tree: Tree) -> None:
    """Everything fits but the cache's own files, which are made too long to."""
    code = """
import sys
from pathlib import Path
from rpac import build
from rpac.files import store
from rpac.lower import Cache
from rpac.spec import load_spec
real = Path.write_bytes
def full(path, data):
    real(path, data[:10])
    raise OSError(28, "No space left on device")
if __name__ == "__main__":
    Path.write_bytes = full
    build.build(load_spec(sys.argv[1]), ["cpu"], Path(sys.argv[2]), Cache(Path(sys.argv[3])))
"""
    script = tmp_path / "script.py"  # a file: workers import the main module
    script.write_text(code)
    command = [sys.executable, str(script), str(TINY), str(tmp_path / "out"), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(tmp_path), timeout=300)
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "out" / "tiny.rpac") == tree(built("cpu"))
    assert tree(tmp_path / "cache") == {}


SPECS = sorted((ROOT / "specs").glob("*.yaml"))


@pytest.mark.parametrize("file", SPECS, ids=lambda file: file.stem)
def test_generated_is_what_the_templates_make(file: Path, tree: Tree) -> None:
    spec = load_spec(file)
    sources = [source for part in spec.parts for _, source in sources_of(part, spec.targets)]
    made: dict[str, Any] = {source.path: source.text for source in sources}
    made[GENERATED_MARK] = f"{spec.hash}\n"
    committed = {name: data.decode() for name, data in tree(ROOT / "generated" / spec.name).items()}
    stale = sorted(name for name in made.keys() | committed.keys() if made.get(name) != committed.get(name))
    assert stale == [], "run `make generate` and commit what changed"


def test_generated_holds_nothing_but_the_shipped_specs() -> None:
    found = {path.name for path in (ROOT / "generated").iterdir()}
    assert found == {load_spec(file).name for file in SPECS}
