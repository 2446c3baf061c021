"""Padding is cut exactly if a text tower does not depend on it."""

from copy import deepcopy
from unittest import mock

import open_clip
import pytest
import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.model import CustomTextCLIP, convert_weights_to_lp
from open_clip.tokenizer import HFTokenizer, SigLipTokenizer
from open_clip.transformer import LayerNormFp32, TextTransformer
from torch import nn

import legrad
from legrad.text import embed_tokens, refuse_active_dropout
from tests.helpers.local_hub import save_text_model_like, tokenizer_like
from tests.helpers.tiny_models import EMBED_DIM, TEXT, VISION, fill, tiny_clip
from tests.helpers.token_rows import truncated

CPU = torch.device("cpu")
END = 49407
SIZES = TEXT | {"vocab_size": END + 1, "layers": 2}
TOKENIZER = open_clip.SimpleTokenizer(context_length=SIZES["context_length"])
TEXTS = ["a dog", "dog " * 15, "", "a cat!!!!!!", "dog " * 14, "dog " * 13, "a cow on a hill"]


class TextModel(nn.Module):
    """The part of an open_clip model with a text tower of its own that texts pass."""

    def __init__(self, text: nn.Module) -> None:
        super().__init__()
        self.visual, self.text = nn.Identity(), text

    def encode_text(self, tokens, normalize=False):
        embeddings = self.text(tokens)
        return nn.functional.normalize(embeddings, dim=-1) if normalize else embeddings


def text_transformer(**options) -> nn.Module:
    return fill(TextModel(TextTransformer(**(SIZES | {"output_dim": EMBED_DIM} | options)))).eval()


MASKED_PADDING = {"embed_cls": True}
TOWERS = {
    "causal, highest id": {},
    "causal, end mark": {"pool_type": "eos", "eos_id": END},
    "causal, end mark that no text has": {"pool_type": "eos", "eos_id": 7},
    "causal, linear head": {"proj_bias": True},
    "causal, no head": {"proj_type": "none"},
    "causal, scaled layers": {"ls_init_value": 0.3},
    "causal, normed queries": {"qk_norm": True},
    "class token": MASKED_PADDING,
    "class token, mask corrected": MASKED_PADDING | {"correct_cls_mask": True},
    "class token, sees all": MASKED_PADDING | {"no_causal_mask": True},
    "class token, normed queries": MASKED_PADDING | {"qk_norm": True},
}
WHOLE_TOWERS = {
    "causal, last token": {"pool_type": "last"},
    "causal, first token": {"pool_type": "first"},
    "sees all, last token": {"no_causal_mask": True, "pool_type": "last"},
    "sees all, highest id": {"no_causal_mask": True},
    "sees all but padding": {"no_causal_mask": True, "use_pad_mask": True},
}


def widths_seen(model: nn.Module, batch_size: int) -> list[int]:
    """Tokens a text in each batch that is looked up; a hook on the tower would make all texts whole."""
    with mock.patch.object(nn.functional, "embedding", wraps=nn.functional.embedding) as looked_up:
        embed_tokens(model, TOKENIZER(TEXTS), CPU, batch_size)
    return [call.args[0].shape[1] for call in looked_up.call_args_list]


def rows_alone(model: nn.Module, tokenizer=TOKENIZER, texts=TEXTS) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model.encode_text(tokenizer([text]), normalize=True) for text in texts])


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("options", (TOWERS | WHOLE_TOWERS).values(), ids=(TOWERS | WHOLE_TOWERS).keys())
def test_rows_are_those_of_each_text_alone_with_all_its_padding(options, batch_size):
    model = text_transformer(**options)
    received = embed_tokens(model, TOKENIZER(TEXTS), CPU, batch_size)
    torch.testing.assert_close(received, rows_alone(model), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("options", TOWERS.values(), ids=TOWERS.keys())
def test_short_texts_pass_as_short_batches(options):
    model = text_transformer(**options)
    widths = widths_seen(model, batch_size=2)
    assert widths == sorted(widths)
    assert widths[0] < SIZES["context_length"] / 2


@pytest.mark.parametrize("options", WHOLE_TOWERS.values(), ids=WHOLE_TOWERS.keys())
def test_towers_that_look_at_padding_get_all_of_it(options):
    assert set(widths_seen(text_transformer(**options), batch_size=2)) == {SIZES["context_length"]}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, MASKED_PADDING], ids=["causal", "class token"])
def test_rows_of_half_precision_towers_stay_close_to_those_of_float32(options, dtype):
    model = text_transformer(**options)
    exact = rows_alone(model)
    rows = embed_tokens(deepcopy(model).to(dtype), TOKENIZER(TEXTS), CPU, 3)
    assert rows.dtype == torch.float32
    assert float((rows * exact).sum(dim=-1).min()) > 0.999


@pytest.mark.parametrize("name", ["xlm-roberta-base", "google/mt5-base", "facebook/nllb-200"])
def test_transformers_towers_get_short_batches_and_report_their_dropout(name, tmp_path):
    save_text_model_like(name, tmp_path / "model")
    tower = HFTextEncoder(str(tmp_path / "model"), EMBED_DIM, pooler_type="mean_pooler", proj_type="linear")
    model = fill(TextModel(tower)).eval()
    tokenizer_like(name).save_pretrained(tmp_path)
    tokenizer = HFTokenizer(str(tmp_path), context_length=40)
    seen = []
    tower.transformer.register_forward_pre_hook(
        lambda *args: seen.append(args[-1]["input_ids"].shape[1]), with_kwargs=True
    )
    rows = embed_tokens(model, tokenizer(TEXTS), CPU, 2)
    assert seen[0] < 20 < seen[-1] == 40
    torch.testing.assert_close(rows, rows_alone(model, tokenizer), rtol=1e-5, atol=2e-6)
    refuse_active_dropout(model)
    with pytest.raises(legrad.InputError, match="drops activations in training mode"):
        refuse_active_dropout(model.train())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_class_token_that_open_clip_leaves_in_float32_joins_texts_of_any_length(dtype):
    halves = TextTransformer(**(SIZES | {"output_dim": EMBED_DIM} | MASKED_PADDING), norm_layer=LayerNormFp32)
    model, single = fill(TextModel(halves)).eval(), text_transformer(**MASKED_PADDING)
    convert_weights_to_lp(model, dtype)
    assert halves.cls_emb.dtype == torch.float32
    received = embed_tokens(model, TOKENIZER(TEXTS), CPU)
    torch.testing.assert_close(received, embed_tokens(single, TOKENIZER(TEXTS), CPU), rtol=0, atol=0.03)


def test_the_model_is_left_as_it_was():
    model = tiny_clip(vocab_size=END + 1)
    model.token_embedding.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    mask = model.attn_mask
    embed_tokens(model, TOKENIZER(TEXTS), CPU, 2)
    assert model.attn_mask is mask
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()].count(False) == 1
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("own_text_tower", [False, True])
def test_tokens_of_another_models_tokenizer_are_refused(own_text_tower):
    vision, text = dict(VISION), dict(SIZES)
    model = (CustomTextCLIP if own_text_tower else open_clip.CLIP)(EMBED_DIM, vision, text).eval()
    for context_length, message in ((77, "the tokenizer gives 77"), (16, "ids up to 60000")):
        token_ids = torch.full((1, context_length), 60_000 if context_length == 16 else 5)
        with pytest.raises(legrad.InputError, match=f"takes 16 tokens with ids below 49408.*{message}"):
            embed_tokens(model, token_ids, CPU)


def test_the_sentencepiece_wrapper_of_open_clip_is_counted_as_it_cleans():
    tokenizer = SigLipTokenizer.__new__(SigLipTokenizer)  # its own constructor downloads
    tokenizer.tokenizer, tokenizer.context_length = tokenizer_like("timm/ViT-B-16-SigLIP"), 8
    # Punctuation is dropped; the six letters, the space before them and the end mark fill the context.
    texts = ["abcdef", "a,b.c!d?e-f", "abcdefg"]
    assert tokenizer(texts)[0].tolist() == tokenizer(texts)[1].tolist()
    assert truncated(tokenizer, texts) == [False, False, True]


def test_the_class_mark_of_clips_takes_a_place_too(tmp_path):
    bert = tokenizer_like("bert-base-uncased")
    bert.add_special_tokens({"bos_token": "[unused1]", "eos_token": "[unused2]"})
    bert.save_pretrained(tmp_path)
    tokenizer = HFTokenizer(str(tmp_path), context_length=10, tokenizer_mode="clips")
    texts = ["abcdefg", "abcdefgh"]
    kept = [len(set(row.tolist())) - 3 for row in tokenizer(texts)]
    assert kept == [7, 7]
    assert truncated(tokenizer, texts) == [False, True]
