"""A layer of experts of different widths in plain torch: Top-K and Top-P routing, the experts, the router's losses.

The layer of the exported model and, as HMoELayer, one for any torch model: no Megatron, no process group. In short:

    layer = HMoELayer(LayerSettings(hidden_size=64, router="topp"), widths_E=[72, 88, 104, 120])
    y_BSH, logits_TE = layer(x_BSH)
    loss = task_loss(y_BSH) + layer.loss(logits_TE)
    loss.backward()

Legend: B rows of the batch, S positions, T = B S tokens, H hidden size, E experts of a layer, K experts a token,
R routed rows (token, expert).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

ROUTERS = ("topk", "topp")
COUNT = "give a whole number of at least 1"


@dataclass(frozen=True)
class LayerSettings:
    """Settings of one HMoELayer, checked when made: ValueError names each field, its value and the remedy.

    Names and meanings are those of HMoEConfig's fields; either serves as ``config`` in this file. Not given, values are
    the paper's (arXiv 2408.10681): p_penalty_coeff 0.1; with "topk" num_experts_per_tok 2; with "topp" router_top_p 0.6
    and router_entropy_coeff 0.03.
    """

    hidden_size: int
    router: str = "topk"
    num_experts_per_tok: int | None = None
    router_top_p: float | None = None
    max_experts_per_token: int | None = None
    router_pre_softmax: bool = False
    router_scaling_factor: float | None = None
    router_dtype: str | None = None
    expert_path: str = "sorted"
    p_penalty_coeff: float = 0.1
    load_balance_coeff: float = 0.0
    router_entropy_coeff: float | None = None

    def __post_init__(self):
        is_topp = self.router == "topp"
        papers = {"router_top_p": 0.6} if is_topp else {"num_experts_per_tok": 2}
        for name, value in (papers | {"router_entropy_coeff": 0.03 if is_topp else 0.0}).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        problems = [] if is_count(self.hidden_size) else [f"hidden_size {self.hidden_size!r}: {COUNT}"]
        problems += [*value_problems(self)]
        if problems := problems or [*router_problems(self)]:
            raise ValueError("LayerSettings: " + "\n".join(problems))


def is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_number(value, low: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= low


def value_problems(config) -> Iterator[str]:
    """Fields of a layer, LayerSettings or HMoEConfig, that can't have their value whatever the others have."""
    for name in ("num_experts_per_tok", "max_experts_per_token"):
        if not is_count(value := getattr(config, name)) and value is not None:
            yield f"{name} {value!r}: {COUNT}"
    choices = {"router": ROUTERS, "router_dtype": (None, "float32"), "expert_path": tuple(EXPERT_PATHS)}
    for name, known in choices.items():
        if getattr(config, name) not in known:
            yield f"{name} {getattr(config, name)!r} is not known: give one of {', '.join(map(repr, known))}"
    for name in ("p_penalty_coeff", "load_balance_coeff", "router_entropy_coeff"):
        if not is_number(getattr(config, name), low=0):
            yield f"{name} {getattr(config, name)!r}: give a finite number, 0 or more"


def router_problems(config, has_experts: bool = True) -> Iterator[str]:
    """Fields of a layer that are missing or do not go together."""
    if config.router == "topk":
        if config.num_experts_per_tok is None and has_experts:
            yield "num_experts_per_tok None: router 'topk' needs a whole number of at least 1"
        others = {"router_top_p": None, "max_experts_per_token": None}
    else:
        if not (is_number(config.router_top_p, low=0) and 0 < config.router_top_p <= 1):
            yield f"router_top_p {config.router_top_p!r}: router 'topp' needs a probability above 0, at most 1"
        others = {"num_experts_per_tok": None, "router_pre_softmax": False, "router_scaling_factor": None}
    for name, unset in others.items():
        if getattr(config, name) != unset:
            yield f"{name} {getattr(config, name)!r} has no effect with router {config.router!r}: remove it"
    factor = config.router_scaling_factor
    if factor is not None and not (is_number(factor, low=0) and factor > 0):
        yield f"router_scaling_factor {factor!r}: give a number above 0, or null"


def experts_problem(config, widths_E: Sequence[int], name: str) -> str | None:
    """Of Top-K over too few experts."""
    wanted = config.num_experts_per_tok or 0
    if config.router == "topk" and len(widths_E) < wanted:
        return (
            f"num_experts_per_tok {wanted} is more than the {len(widths_E)} experts of {name}: "
            f"give at most {len(widths_E)}"
        )
    return None


def top_k_routing(
    logits_TE: torch.Tensor, k: int, pre_softmax: bool = False, scaling_factor: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights_TE in the dtype of the logits, routing_map_TE bool) of the K largest logits; softmax in float32.

    pre_softmax False: softmax over the K logits. True: over all E, then Top-K, not renormalised. Arithmetic, ties
    and order of sums are those of Megatron-Core's topk_routing_with_score_function.
    """
    scores_TE = torch.softmax(logits_TE, dim=-1, dtype=torch.float32) if pre_softmax else logits_TE
    # Megatron sorts only where gradients are on, and the order shows in the last bit of the softmax and in ties.
    scores_TK, expert_TK = torch.topk(scores_TE, k, dim=1, sorted=torch.is_grad_enabled())
    weights_TK = scores_TK if pre_softmax else torch.softmax(scores_TK, dim=-1, dtype=torch.float32)
    if scaling_factor is not None:
        weights_TK = weights_TK * scaling_factor
    weights_TE = torch.zeros_like(logits_TE).scatter(1, expert_TK, weights_TK.type_as(logits_TE))
    return weights_TE, torch.zeros_like(logits_TE, dtype=torch.bool).scatter(1, expert_TK, True)


def top_p_routing(
    logits_TE: torch.Tensor, top_p: float, max_experts: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights_TE in the dtype of the logits, routing_map_TE bool): the fewest experts a token whose probabilities, a
    float32 softmax over all E, add up to ``top_p`` (arXiv 2403.07652), renormalised.

    A token has one expert or more, at most ``max_experts``; among equal probabilities the lower expert wins.
    """
    probs_TE = torch.softmax(logits_TE, dim=-1, dtype=torch.float32)
    sorted_TE, order_TE = probs_TE.sort(dim=-1, descending=True, stable=True)
    keep_TE = (sorted_TE.cumsum(dim=-1) - sorted_TE) < top_p
    keep_TE[:, 0] = True  # also where a NaN makes every comparison false
    if max_experts is not None:
        keep_TE[:, max_experts:] = False
    routing_map_TE = torch.zeros_like(keep_TE).scatter(1, order_TE, keep_TE)
    chosen_TE = probs_TE * routing_map_TE
    return (chosen_TE / chosen_TE.sum(dim=-1, keepdim=True)).type_as(logits_TE), routing_map_TE


def route(logits_TE: torch.Tensor, config) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights_TE, routing_map_TE) by the router that the configuration names."""
    if config.router == "topp":
        return top_p_routing(logits_TE, config.router_top_p, config.max_experts_per_token)
    return top_k_routing(logits_TE, config.num_experts_per_tok, config.router_pre_softmax, config.router_scaling_factor)


def router_loss(logits_TE: torch.Tensor, widths_E: list[int], valid_T: torch.Tensor | None, config) -> torch.Tensor:
    """Losses of one layer's router times their coefficients, a float32 scalar.

    With T_i tokens that chose expert i of T (a count, no gradient), Phat_i its mean probability, h_i its width over the
    mean width: P-Penalty E sum_i (T_i / T) h_i Phat_i (arXiv 2408.10681, eq. 4), load balance the same with
    h_i = 1 (eq. 3), router entropy the mean over tokens of -sum_i P_i log P_i (arXiv 2403.07652, eq. 7).
    valid_T: False for padding, which is not counted; None counts every token.
    """
    counted_TE = route(logits_TE.detach(), config)[1]
    log_probs_TE = torch.log_softmax(logits_TE, dim=-1, dtype=torch.float32)
    probs_TE = log_probs_TE.exp()
    entropy_T = -(probs_TE * log_probs_TE).sum(dim=-1)
    num_experts, num_tokens = len(widths_E), logits_TE.shape[0]
    if valid_T is not None:
        counted_TE, probs_TE = counted_TE & valid_T.unsqueeze(-1), probs_TE * valid_T.unsqueeze(-1)
        entropy_T, num_tokens = entropy_T * valid_T, valid_T.sum()
    counts_E, prob_sum_E = counted_TE.sum(dim=0).float(), probs_TE.sum(dim=0)
    width_E = torch.tensor(widths_E, device=logits_TE.device)
    weight_E = config.p_penalty_coeff * (width_E / width_E.float().mean()) + config.load_balance_coeff
    balance = (prob_sum_E * counts_E * weight_E).sum() * num_experts / (num_tokens * num_tokens)
    return balance + config.router_entropy_coeff * entropy_T.sum() / num_tokens


class HMoEMLP(nn.Module):
    """y = W_down (p * silu(W_gate x) * (W_up x)): an expert, p its routing weight, or a dense layer, no p."""

    def __init__(self, config, width: int):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: torch.Tensor, p_R: torch.Tensor | None = None) -> torch.Tensor:
        hidden = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        if p_R is not None:
            hidden = (hidden * p_R.unsqueeze(-1)).to(hidden.dtype)
        return self.down_proj(hidden)


def loop_path(experts, x_TH, weights_TE, routing_map_TE):
    """y_TH, the sum of each token's experts: the reference, one expert after the other."""
    y_TH = torch.zeros_like(x_TH)
    for index, expert in enumerate(experts):
        token_R = routing_map_TE[:, index].nonzero().squeeze(-1)
        y_RH = expert(x_TH[token_R], weights_TE[token_R, index])
        y_TH.index_add_(0, token_R, y_RH.to(y_TH.dtype))
    return y_TH


def sorted_path(experts, x_TH, weights_TE, routing_map_TE):
    """As loop_path: rows are sorted by expert once and added up once; without gradients unchosen experts don't run."""
    expert_R, token_R = routing_map_TE.t().nonzero(as_tuple=True)
    rows_E = routing_map_TE.sum(dim=0).tolist()
    x_RH, p_R = x_TH[token_R], weights_TE[token_R, expert_R]
    # With gradients they run on no rows: every weight gets a gradient, as DistributedDataParallel expects.
    y_RH = torch.cat(
        [
            expert(x, p)
            for expert, x, p in zip(experts, x_RH.split(rows_E), p_R.split(rows_E), strict=True)
            if len(x) or torch.is_grad_enabled()
        ]
    )
    return torch.zeros_like(x_TH).index_add_(0, token_R, y_RH.to(x_TH.dtype))


EXPERT_PATHS = {"sorted": sorted_path, "loop": loop_path}


class HMoERouter(nn.Module):
    """Logits of the experts, in the model's dtype or float32; not an nn.Linear, so that it is never quantised."""

    def __init__(self, config, num_experts: int):
        super().__init__()
        self.in_float32 = config.router_dtype == "float32"
        self.weight = nn.Parameter(torch.empty(num_experts, config.hidden_size))

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        if not self.in_float32:
            return nn.functional.linear(x_TH, self.weight)
        with torch.autocast(x_TH.device.type, enabled=False):
            return nn.functional.linear(x_TH.float(), self.weight.float())


class HMoEBlock(nn.Module):
    """Router and experts of one layer; the router's weight is left undrawn. config: HMoEConfig or LayerSettings."""

    def __init__(self, config, widths_E: list[int]):
        super().__init__()
        self.config = config
        self.gate = HMoERouter(config, len(widths_E))
        self.experts = nn.ModuleList(HMoEMLP(config, width) for width in widths_E)

    def forward(self, x_BSH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(y_BSH, logits_TE)."""
        x_TH = x_BSH.reshape(-1, x_BSH.shape[-1])
        logits_TE = self.gate(x_TH)
        y_TH = EXPERT_PATHS[self.config.expert_path](self.experts, x_TH, *route(logits_TE, self.config))
        return y_TH.view_as(x_BSH), logits_TE


class HMoELayer(HMoEBlock):
    """HMoEBlock for any torch model: settings and widths checked, weights drawn, the router's losses at hand.

    forward: x_BSH (any leading dimensions) -> (y_BSH in its dtype, logits_TE). Each matrix, the router's too, is drawn
    as nn.Linear draws its own, uniform within 1 / sqrt(inputs). Raises ValueError for widths that are no whole numbers
    of at least 1, and for fewer than K of them.
    """

    def __init__(self, settings: LayerSettings, widths_E: Sequence[int]):
        widths_E = tuple(widths_E.tolist() if hasattr(widths_E, "tolist") else widths_E)  # of NumPy or torch
        if not widths_E or not all(map(is_count, widths_E)):
            raise ValueError(f"HMoELayer: widths_E {widths_E!r}: give a whole number of at least 1 for each expert")
        if problem := experts_problem(settings, widths_E, "widths_E"):
            raise ValueError(f"HMoELayer: {problem}")
        super().__init__(settings, widths_E)
        self.widths_E = widths_E
        # Not in HMoERouter: HMoEForCausalLM draws its own, and one draw more would change all weights of a seed.
        nn.init.kaiming_uniform_(self.gate.weight, a=math.sqrt(5))

    def loss(self, logits_TE: torch.Tensor, valid_T: torch.Tensor | None = None) -> torch.Tensor:
        """router_loss with this layer's widths and coefficients, a float32 scalar to add to the task's loss."""
        return router_loss(logits_TE, self.widths_E, valid_T, self.config)
