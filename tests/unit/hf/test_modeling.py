"""HMoEForCausalLM: attention, cache, generation, losses, gradients, weights on disk."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import FP32_BOUND, LOSSES, TOP_K, TOP_P, gradients, tiny_config, tiny_model, token_ids

from hmoe_megatron.hf.modeling_hmoe import HMoEForCausalLM

KINDS = pytest.mark.parametrize("kind", [TOP_K, TOP_P], ids=["topk", "topp"])
EAGER, SDPA = {"attn_implementation": "eager"}, {"attn_implementation": "sdpa"}


def close(ours, theirs, bound=FP32_BOUND):
    torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound)


@KINDS
@torch.no_grad()
def test_attention_backends_agree(kind):
    ids_BS = token_ids()
    mask_BS = torch.ones_like(ids_BS)
    mask_BS[1, :4] = 0
    eager, sdpa = (tiny_model(**kind, **backend)(ids_BS, attention_mask=mask_BS).logits for backend in (EAGER, SDPA))
    close(eager[0], sdpa[0])
    close(eager[1, 4:], sdpa[1, 4:])


@pytest.mark.parametrize("backend", [EAGER, SDPA], ids=["eager", "sdpa"])
@KINDS
@torch.no_grad()
def test_a_cache_changes_nothing(kind, backend):
    model = tiny_model(**kind, **backend)
    ids_BS = token_ids()
    whole = model(ids_BS, use_cache=False)
    assert whole.past_key_values is None
    first = model(ids_BS[:, :5], use_cache=True)
    parts, cache = [first.logits], first.past_key_values
    for position in range(5, 12):
        outputs = model(ids_BS[:, position : position + 1], past_key_values=cache, use_cache=True)
        parts.append(outputs.logits)
    assert cache.get_seq_length() == 12
    close(torch.cat(parts, dim=1), whole.logits)


@KINDS
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_text_is_the_same_without_cache(kind, cache):
    model = tiny_model(**kind, output_router_logits=True)
    ids_BS = token_ids()
    kwargs = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(ids_BS, cache_implementation=cache, **kwargs)
    plain = model.generate(ids_BS, use_cache=False, **kwargs)
    assert cached.shape == (2, 28) and len(set(cached[0, 12:].tolist())) > 2
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("backend", [EAGER, SDPA], ids=["eager", "sdpa"])
@KINDS
@torch.no_grad()
def test_left_padded_rows_are_as_alone(kind, backend):
    model = tiny_model(**kind, **backend)
    rows = [token_ids(1, 9, seed=4), token_ids(1, 4, seed=5)]
    ids_BS = torch.cat([torch.nn.functional.pad(row, (9 - row.shape[1], 0), value=63) for row in rows])
    mask_BS = torch.tensor([[1] * 9, [0] * 5 + [1] * 4])
    logits_BSV = model(ids_BS, attention_mask=mask_BS).logits
    assert logits_BSV.isfinite().all()
    kwargs = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 63}
    texts = model.generate(ids_BS, attention_mask=mask_BS, **kwargs)
    for index, row in enumerate(rows):
        close(logits_BSV[index, 9 - row.shape[1] :], model(row).logits[0])
        assert torch.equal(texts[index, 9:], model.generate(row, **kwargs)[0, row.shape[1] :])


@pytest.mark.parametrize("reentrant", [False, True])
@KINDS
def test_gradient_checkpointing_changes_no_gradient(kind, reentrant):
    ids_BS = token_ids()
    results, calls = [], []
    for checkpointing in (False, True):
        model = tiny_model(**kind, **LOSSES, output_router_logits=True).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        calls.append(0)

        def count(*_):
            calls[-1] += 1

        for layer in model.model.layers:
            layer.mlp.register_forward_pre_hook(count)
        outputs = model(ids_BS, labels=ids_BS)
        outputs.loss.backward()
        results.append((outputs.loss, gradients(model)))
    assert calls == [3, 6]
    close(results[0], results[1], bound=1e-6)


@torch.no_grad()
def test_loss_is_the_cross_entropy_of_the_next_token():
    model, ids_BS = tiny_model(), token_ids()
    labels_BS = ids_BS.clone()
    labels_BS[0, :6] = -100
    outputs = model(ids_BS, labels=labels_BS)
    log_probs_BSV = outputs.logits[:, :-1].double().log_softmax(dim=-1)
    loss_BS = -log_probs_BSV.gather(-1, ids_BS[:, 1:, None]).squeeze(-1)
    kept_BS = labels_BS[:, 1:] != -100
    assert kept_BS.sum() == 22 - 5
    close(outputs.loss.double(), loss_BS[kept_BS].mean())


@torch.no_grad()
def test_logits_to_keep_hidden_states_and_attentions():
    model, ids_BS = tiny_model(**EAGER), token_ids()
    outputs = model(ids_BS, output_hidden_states=True, output_attentions=True)
    close(model(ids_BS, logits_to_keep=1).logits, outputs.logits[:, -1:])
    close(model(ids_BS, logits_to_keep=torch.tensor([2, 7])).logits, outputs.logits[:, [2, 7]])
    close(model(inputs_embeds=model.get_input_embeddings()(ids_BS)).logits, outputs.logits)
    assert len(outputs.hidden_states) == 4 and torch.equal(outputs.hidden_states[0], model.model.embed_tokens(ids_BS))
    close(model.lm_head(outputs.hidden_states[-1]), outputs.logits)
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(2, 4, 12, 12)] * 3
    assert not outputs.attentions[0].triu(1).any()
    assert torch.equal(model(ids_BS, return_dict=False)[0], model(ids_BS).logits)


def test_ids_and_embeddings_are_one_or_the_other():
    model, ids_BS = tiny_model(), token_ids()
    for kwargs in ({}, {"input_ids": ids_BS, "inputs_embeds": model.model.embed_tokens(ids_BS)}):
        with pytest.raises(ValueError, match="give either input_ids or inputs_embeds"):
            model(**kwargs)


def contract_keys(config) -> set[str]:
    keys = {"model.embed_tokens.weight", "model.norm.weight"}
    if not config.tie_word_embeddings:
        keys.add("lm_head.weight")
    for layer, widths in enumerate(config.expert_widths):
        names = [f"self_attn.{name}_proj.weight" for name in "qkvo"] + ["mlp.gate.weight"] * bool(widths)
        names += ["input_layernorm.weight", "post_attention_layernorm.weight"]
        names += [f"self_attn.{name}_proj.bias" for name in "qkv"] if config.attention_bias else []
        names += [f"self_attn.{name}_norm.weight" for name in "qk"] if config.use_qk_norm else []
        mlps = [f"mlp.experts.{expert}" for expert in range(len(widths))] or ["mlp"]
        names += [f"{mlp}.{name}_proj.weight" for mlp in mlps for name in ("gate", "up", "down")]
        keys |= {f"model.layers.{layer}.{name}" for name in names}
    return keys


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_weights_survive_the_disk_in_shards(tied, dtype, tmp_path):
    model = tiny_model(tie_word_embeddings=tied, attention_bias=True, use_qk_norm=True, **TOP_P).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 2 and set(index) == contract_keys(model.config)
    stored = {name: weight for shard in set(index.values()) for name, weight in load_file(tmp_path / shard).items()}
    assert stored["model.layers.0.mlp.experts.2.down_proj.weight"].shape == (32, 40)
    again, info = HMoEForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.dtype == dtype
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    model.model.rotary_emb = again.model.rotary_emb  # .to(bfloat16) has rounded the first one's frequencies
    with torch.no_grad():
        assert torch.equal(again(token_ids()).logits, model(token_ids()).logits)


@KINDS
@torch.no_grad()
def test_bfloat16_is_near_float32(kind):
    ids_BS = token_ids()
    logits, rounded = tiny_model(**kind)(ids_BS).logits, tiny_model(**kind).to(torch.bfloat16)
    half = rounded(ids_BS).logits
    assert half.dtype == torch.bfloat16
    # Most tokens choose the same experts; one that chooses others may be far off.
    off_BS = (half.float() - logits).norm(dim=-1) / logits.norm(dim=-1)
    assert off_BS.median() < 0.05
    assert rounded.generate(ids_BS, max_new_tokens=4, do_sample=False, pad_token_id=0).shape == (2, 16)


@KINDS
def test_it_trains_under_autocast(kind):
    model = tiny_model(**kind, **LOSSES, output_router_logits=True, initializer_range=0.05).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids_BS, values = token_ids(4), []
    for _ in range(15):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids_BS, labels=ids_BS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < values[0] / 2


def test_initial_weights_have_their_range():
    torch.manual_seed(0)
    model = HMoEForCausalLM(tiny_config(hidden_size=64, head_dim=16, attention_bias=True, use_qk_norm=True))
    for name, weight in model.named_parameters():
        if "norm" in name:
            assert (weight == 1).all(), name
        elif name.endswith("bias"):
            assert (weight == 0).all(), name
        else:
            # The standard deviation of n draws is off by 1 / sqrt(2 n) of itself: five of that.
            assert abs(weight.std().item() / 0.2 - 1) < 5 / (2 * weight.numel()) ** 0.5, name
            assert abs(weight.mean().item()) < 5 * 0.2 / weight.numel() ** 0.5, name
