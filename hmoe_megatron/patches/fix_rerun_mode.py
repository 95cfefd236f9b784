"""A flag that Megatron's own enumeration does not know."""

from hmoe_megatron.patches.registry import patch, replace


@patch("fix")
def name_of_report_stats():
    """--rerun-mode report_stats is made a RerunMode by its value, which is report_determinism_stats: every run with it
    ends with a ValueError before its first step."""
    from megatron.core.rerun_state_machine import RerunMode

    replace(
        RerunMode,
        "_missing_",
        classmethod(lambda cls, value: cls.REPORT_DETERMINISM_STATS if value == "report_stats" else None),
    )
