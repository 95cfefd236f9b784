"""What a step's token counts say, as plain numbers: a record of telemetry.jsonl, its console line and its scalars.

Legend: L MoE layers, E logical experts, R expert-parallel ranks.
"""

import numpy as np

from hmoe_megatron.telemetry.accounting import ParameterCounts, expert_parameters


def summary(values_L) -> dict[str, float]:
    """min, p50, p90, p95 and max over layers."""
    values = np.asarray(values_L, dtype=float)
    p50, p90, p95 = np.percentile(values, (50, 90, 95))
    return {"min": values.min(), "p50": p50, "p90": p90, "p95": p95, "max": values.max()}


def max_over_mean(values) -> float:
    """1 when all ranks have the same; 1 also when none has anything."""
    values = np.asarray(values, dtype=float)
    return float(values.max() / values.mean()) if values.any() else 1.0


def routing_record(counts_LE, tokens_L, layout, hidden_size: int, parameters: ParameterCounts) -> dict:
    """What a step's token counts say, as plain numbers.

    counts_LE: tokens that chose each logical expert, over all ranks; tokens_L: tokens routed. ``layout``: ExpertLayout.
    Shares are of a layer's routed tokens (or FLOPs) and sum to 1 over experts. Balances are max over mean over ranks.
    """
    counts_LE, tokens_L = np.asarray(counts_LE, float), np.maximum(np.asarray(tokens_L, float), 1)
    widths_LE = np.array([layout.widths[layer] for layer in layout.layers], float)
    cost_LE = counts_LE * widths_LE
    cost_LR, tokens_LR = _by_rank(layout, counts_LE)
    active_width_L = cost_LE.sum(1) / tokens_L
    active_L = expert_parameters(hidden_size, active_width_L)
    return {
        "activated_parameters": float(parameters.always_active + active_L.sum()),
        "total_parameters": parameters.total,
        "active_width": float(active_width_L.mean()),
        "experts_per_token": float((counts_LE.sum(1) / tokens_L).mean()),
        "experts_without_token": [[layout.layers[row], int(e)] for row, e in np.argwhere(counts_LE == 0)],
        "flops_balance": max_over_mean(cost_LR.sum(0)),
        "token_balance": max_over_mean(tokens_LR.sum(0)),
        "layers": [
            {
                "layer": layer,
                "token_share": _share(counts_LE[row]),
                "flops_share": _share(cost_LE[row]),
                "experts_per_token": float(counts_LE[row].sum() / tokens_L[row]),
                "activated_expert_parameters": float(active_L[row]),
                "flops_balance": max_over_mean(cost_LR[row]),
                "token_balance": max_over_mean(tokens_LR[row]),
            }
            for row, layer in enumerate(layout.layers)
        ],
    }


def _share(values_E) -> list[float]:
    return (values_E / max(values_E.sum(), 1)).tolist()


def _by_rank(layout, counts_LE):
    """(tokens x width, tokens) of every expert-parallel rank and layer under the plan, [L, R] each."""
    shape = (len(layout.layers), len(layout.plan.layers[0].pieces))
    cost_LR, tokens_LR = np.zeros(shape), np.zeros(shape)
    for row, layer in enumerate(layout.layers):
        for rank, pieces in enumerate(layout.pieces(layer)):
            cost_LR[row, rank] = sum(counts_LE[row, piece.expert] * piece.width for piece in pieces)
            tokens_LR[row, rank] = sum(counts_LE[row, piece.expert] for piece in pieces)
    return cost_LR, tokens_LR


LAYER_SUMMARIES = ("activated_expert_parameters", "experts_per_token", "flops_balance", "token_balance")


def over_layers(record: dict) -> dict[str, dict[str, float]]:
    """min / p50 / p90 / p95 / max over layers of what a record says by layer."""
    return {name: summary([layer[name] for layer in record["layers"]]) for name in LAYER_SUMMARIES}


def console_line(record: dict) -> str:
    """One line of at most 100 columns."""
    return (
        f" hmoe {record['iteration']} | active {record['activated_parameters'] / 1e6:.1f}M of "
        f"{record['total_parameters'] / 1e6:.1f}M, {record['experts_per_token']:.2f} experts/token | "
        f"max/mean FLOPs {record['flops_balance']:.2f} time {record['time_balance']:.2f} | "
        f"idle {len(record['experts_without_token'])}"
    )


def scalars_of(record: dict) -> dict[str, float]:
    """A record as TensorBoard scalars."""
    names = (
        "activated_parameters",
        "experts_per_token",
        "flops_balance",
        "token_balance",
        "time_balance",
        "tokens_per_s",
    )
    scalars = {f"hmoe/{name}": record[name] for name in names}
    scalars["hmoe/experts_without_token"] = len(record["experts_without_token"])
    for name, parts in record["over_layers"].items():
        scalars |= {f"hmoe/{name}/{part}": value for part, value in parts.items()}
    for layer in record["layers"]:
        for kind in ("token_share", "flops_share"):
            for expert, value in enumerate(layer[kind]):
                scalars[f"hmoe/{kind}/layer_{layer['layer']}/expert_{expert}"] = value
    for rank, value in enumerate(record["expert_time_ms"]):
        scalars[f"hmoe/expert_time_ms/rank_{rank}"] = value
    return scalars
