"""Fields of a recipe, by what they change of a run. Imports nothing."""

# Where and how fast a run is computed: none of its numbers. Every machine may set them for itself.
OF_THE_MACHINE = (
    "accumulation",
    "checkpoint",
    "compilation_cache",
    "data.cache_gib",
    "data.data_dir",
    "data.num_threads",
    "data.num_workers",
    "data.prefetch",
    "log_every",
    "mesh",
    "model.attention",
    "model.remat",
    "profile_steps",
)
# A restart may also set what is seen of a run, and whether a broken image ends it.
MAY_CHANGE = (*OF_THE_MACHINE, "classification", "data.skip_broken", "eval_every", "fewshot")


def covered(name: str, fields: tuple[str, ...]) -> bool:
    """Whether a dotted name is one of the fields, or below one."""
    return any(name == field or name.startswith(field + ".") for field in fields)
