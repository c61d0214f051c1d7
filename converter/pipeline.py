"""The conversion from top to bottom: open, plan, write.

Invariant: the bytes are a function of input, options, device kind and library versions; each tensor has its place
before the first is written. The output is held from the first moment, so that two conversions refuse each other.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import torch

from ..formats import naming
from ..formats.container import TensorSpec
from ..formats.errors import OptionError, OutputError, SourceError
from ..formats.manifest import Manifest
from ..formats.partial_output import PartialOutput, check_is_no_input, check_output
from ..formats.reader import SalrFile
from ..formats.resuming import PLAN_NAME, ResumingWriter
from ..formats.sharding import ShardContent, complete_set, shard_manifests, shard_name
from ..formats.version import VERSION
from .adapters.records import input_file
from .adapters.source import Adapter
from .calibration.budget import with_budget
from .execution.decisions import Decisions, decided_once
from .execution.devices import environment, resolve_devices, worker_count
from .execution.division import contents_by_size, contents_in_parts
from .execution.fingerprint import InputFiles, fingerprint, lost
from .execution.jobs import Job, Outcome, Progress
from .execution.packers import Executor, LocalExecutor, Team
from .execution.spool import HiddenSpool
from .execution.threads import beside, one_thread_each
from .options import ConvertOptions
from .plan import Plan, make_plan
from .report import ConvertReport, error_report, size_report
from .sources.checkpoint import Asset, Checkpoint, sha256
from .sources.opening import open_source


def convert(
    source: str | Path,
    out: str | Path,
    options: ConvertOptions | None = None,
    *,
    progress: Progress | None = None,
    executor: Executor | None = None,
) -> ConvertReport:
    """Convert a model or a PEFT LoRA (a directory, a .gguf file or a hub id) to one .salr file, or shards of one.

    A conversion that was interrupted goes on where it was, with the same bytes at its end.

    Args:
        source: the model.
        out: the file to make; a directory with ``max_shard_size`` or ``part``.
        options: how.
        progress: called with modules done and modules in all.
        executor: who packs; None for threads of this process.

    Raises:
        SourceError, AdapterError: the input cannot be read or converted.
        OptionError: the options do not fit the input.
        OutputError: the output exists, cannot be written, does not fit, or is being written by another run.
    """
    options = options or ConvertOptions()
    with open_output(out, options) as partial:
        return convert_plan(plan_conversion(source, options, partial), partial, progress=progress, executor=executor)


@contextmanager
def open_output(out: str | Path, options: ConvertOptions) -> Iterator[PartialOutput]:
    """Hold the output; a directory that was made for a part goes again where nothing came into it.

    Raises:
        OutputError: it exists, cannot be written, or another run is writing it.
    """
    path, is_directory = Path(out), options.max_shard_size is not None
    directory: AbstractContextManager[None] = nullcontext()
    if options.part is not None:
        path, directory = path / shard_name(*options.part), _directory_of_parts(path)
    with (
        directory,
        PartialOutput(path, force=options.force, fresh=options.fresh, is_directory=is_directory) as partial,
    ):
        yield partial


@contextmanager
def _directory_of_parts(path: Path) -> Iterator[None]:
    """Make a directory where it is missing; if it is empty afterwards, remove it."""
    if path.is_dir():
        yield
        return
    check_output(path, force=False, is_directory=True)
    try:
        path.mkdir(exist_ok=True)  # another part may make it at the same moment
    except OSError as error:
        raise OutputError(f"cannot be made ({error.strerror})", path=path, fix="choose another output") from error
    try:
        yield
    finally:
        with suppress(OSError):  # it holds this part, what an interrupted run left, or another part
            path.rmdir()


def convert_plan(
    plan: Plan, partial: PartialOutput, *, progress: Progress | None = None, executor: Executor | None = None
) -> ConvertReport:
    """Carry out a plan and report on the finished output."""
    started = time.perf_counter()
    outcome = write_plan(plan, partial, progress or (lambda done, total: None), executor)
    file = SalrFile(partial.path)
    if plan.options.part is not None:
        complete_set(partial.path.parent)
    return ConvertReport(
        path=str(partial.path),
        sizes=size_report(file),
        error=error_report(file.modules),
        n_modules=len(file.modules),
        n_kept=len(plan.kept),
        n_inputs=len(plan.ledger),
        seconds=time.perf_counter() - started,
        notes=(*plan.notes, *outcome.notes),
    )


def plan_conversion(source: str | Path, options: ConvertOptions, partial: PartialOutput | None = None) -> Plan:
    """Open the source with its adapters and decide what becomes of every tensor.

    What needs a look at the whole model is kept in ``options.plan_file``, or else in ``partial``.

    Raises:
        OutputError: the output is one of the files that are read.
        SourceError, AdapterError, OptionError: see ``convert``.
    """
    checkpoint, adapters = open_source(source, options)
    for adapter in adapters:
        adapter.require_finite()
    if partial is not None:
        assets = [asset.path for asset in checkpoint.assets()]
        check_is_no_input(partial.path, [*_input_files(checkpoint, adapters).paths.values(), *assets])
    if not options.looks_at_whole_model:
        return make_plan(checkpoint, adapters, options)
    if options.target_bits is not None and (not options.module.sparsity or options.overrides):
        raise OptionError(
            "--target-bits chooses every sparsity and rank itself", fix="drop --preset, --recipe and --set"
        )
    device = resolve_devices(options.device)[0]

    def decide() -> Decisions:
        plan = make_plan(checkpoint, adapters, options)
        if options.target_bits is None:
            return Decisions(kept_counts={module.name: module.entry.nnz for module in plan.modules})
        with one_thread_each(worker_count(options.workers, [device])) as pool:
            return Decisions(overrides=with_budget(plan, options, device, pool)[0].overrides)

    is_part = options.part is not None
    path = options.plan_file or (None if partial is None or is_part else partial.folder / PLAN_NAME)
    undivided = replace(options, part=None, max_shard_size=None)
    facts = fingerprint(undivided, device, _input_files(checkpoint, adapters), {}, [])
    decided = decided_once(path, facts, decide, must_exist=is_part)
    if decided.overrides is not None:
        options = replace(options, overrides=decided.overrides)
    return make_plan(checkpoint, adapters, options, decided.kept_counts)


def write_plan(plan: Plan, partial: PartialOutput, progress: Progress, executor: Executor | None = None) -> Outcome:
    """Carry out a plan, or go on with it; nothing of the final name exists until all of it is done."""
    options, devices = plan.options, resolve_devices(plan.options.device)
    workers = worker_count(options.workers, devices)
    contents = _contents(plan)
    inputs = _input_files(plan.checkpoint, plan.adapters)
    assets = {naming.ASSET_PREFIX + asset.name: _read(asset, plan.checkpoint) for asset in plan.assets()}
    facts = fingerprint(options, devices[0], inputs, assets, plan.specs())
    with (
        ResumingWriter(partial, _specs_by_file(plan, contents), facts) as writer,
        (executor or LocalExecutor(devices, workers)).open(plan) as packers,
        one_thread_each(max(workers, len(packers))) as pool,
        beside(2) as helpers,
    ):
        copies = helpers.submit(_copy_unchanged, plan, writer, assets)
        hashes = helpers.submit(_digests, inputs, writer)
        job = Job(plan, devices[0], writer, HiddenSpool(partial.folder), inputs.watch)
        outcome = job.run(Team(pool, packers), progress)
        copies.result()
        manifest = _manifest(plan, outcome, devices[0], hashes.result())
        inputs.check()
        writer.finish(_manifests(manifest, contents, options.part))
    return replace(outcome, notes=[*_notes_on_size(contents, options.max_shard_size), *outcome.notes])


def _contents(plan: Plan) -> list[ShardContent]:
    """Return what each shard holds, nothing for one file."""
    if plan.options.part is not None:
        return contents_in_parts(plan, plan.options.part[1])
    return contents_by_size(plan, plan.options.max_shard_size) if plan.options.max_shard_size is not None else []


def _notes_on_size(contents: list[ShardContent], most_bytes: int | None) -> list[str]:
    """Return what to know about shards that are larger than was asked for."""
    sizes = [sum(spec.n_bytes for spec in content.specs) for content in contents]
    larger = [size for size in sizes if most_bytes is not None and size > most_bytes]
    if not larger:
        return []
    return [
        f"{len(larger)} of {len(sizes)} shards hold more than the {most_bytes:,} bytes of --max-shard-size: a module "
        f"is never divided, and the largest takes {max(larger):,} bytes. Give at least that, or join them with "
        "`salr join`."
    ]


def _specs_by_file(plan: Plan, contents: list[ShardContent]) -> list[TensorSpec] | dict[str, list[TensorSpec]]:
    """Return the tensors of the file to write, or of each shard by its name."""
    if not contents:
        return plan.specs()
    if plan.options.part is not None:
        return list(contents[plan.options.part[0] - 1].specs)
    return {shard_name(i, len(contents)): list(content.specs) for i, content in enumerate(contents, 1)}


def _manifests(
    whole: Manifest, contents: list[ShardContent], part: tuple[int, int] | None
) -> Manifest | dict[str, Manifest]:
    """Return the manifest of the file to write, or of each shard by its name."""
    if not contents:
        return whole
    manifests = shard_manifests(whole, contents)
    if part is not None:
        return manifests[part[0] - 1]
    return {shard_name(i, len(manifests)): manifest for i, manifest in enumerate(manifests, 1)}


def _copy_unchanged(plan: Plan, writer: ResumingWriter, assets: Mapping[str, bytes]) -> None:
    """Write what is carried along bit for bit and is not there yet: tensors that stay dense, and assets."""
    for tensor in plan.kept:
        if writer.wants(tensor.name):
            writer.write_pieces(tensor.name, plan.checkpoint.pieces(tensor.name))
            writer.record([tensor.name])
    for name, data in assets.items():
        if writer.wants(name):
            writer.write_pieces(name, [data])
            writer.record([name])


def _digests(inputs: InputFiles, writer: ResumingWriter) -> list[dict[str, str]]:
    """Return name and SHA-256 of each input file; those that an interrupted run has computed are not read again."""
    known = {note["file"]: note["sha256"] for note in writer.notes if "sha256" in note}
    for name, path in inputs.paths.items():
        if name not in known:
            try:
                known[name] = sha256(path)
            except OSError as error:
                raise lost(path, error) from error
            writer.record(note={"file": name, "sha256": known[name]})
    return [{"name": name, "sha256": known[name]} for name in inputs.paths]


def _read(asset: Asset, checkpoint: Checkpoint) -> bytes:
    """Return a file that is carried along; a link in the model's directory must not lead to what lies elsewhere.

    A hub's cache, where files are links to ``../../blobs``, counts as one directory.
    """
    path, inside = asset.path.resolve(), checkpoint.directory.resolve()
    roots = [inside, checkpoint.folder.resolve()]
    roots += [inside.parents[1] / "blobs"] if inside.parent.name == "snapshots" else []
    if not any(path.is_relative_to(root) for root in roots):
        raise SourceError(
            f"leads to {path}", path=asset.path, needed="a file of the model's directory", fix="copy it there"
        )
    try:
        return asset.read()
    except OSError as error:
        raise lost(asset.path, error) from error


def _input_files(checkpoint: Checkpoint, adapters: tuple[Adapter, ...] | list[Adapter]) -> InputFiles:
    """Return the files read, each under the name that the ledger gives it."""
    paths = {path.name: path for path in checkpoint.source_paths()}
    return InputFiles(paths | {input_file(a.name, path.name): path for a in adapters for path in a.weight_paths()})


def _manifest(plan: Plan, outcome: Outcome, device: torch.device, files: list[dict[str, str]]) -> Manifest:
    return Manifest(
        generator=f"salr {VERSION}",
        modules=outcome.entries,
        checksums={},
        ledger=plan.ledger,
        options=outcome.options.recorded(),
        source={
            "architecture": plan.checkpoint.architecture,
            "class": plan.class_name,
            "files": files,
            **plan.checkpoint.provenance,
        },
        environment=environment(device),
    )
