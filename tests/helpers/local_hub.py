"""What open_clip's configurations name on the Hugging Face hub, in small and on this disk.

Tokenizers of the same classes, with the same marks and padding, that know single characters; text models of
the same architectures, with random weights.
"""

import string
from pathlib import Path

import open_clip
from safetensors.torch import save_model
from tokenizers import pre_tokenizers
from transformers import (
    AutoModel,
    BertTokenizer,
    GemmaTokenizer,
    M2M100Config,
    MT5Config,
    NllbTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    RobertaConfig,
    RobertaTokenizer,
    T5Tokenizer,
    XLMRobertaConfig,
    XLMRobertaTokenizer,
)

from tests.helpers.tiny_models import fill

CHARACTERS = ["▁", *string.ascii_letters, *string.digits, *string.punctuation, *"äöüßéñ犬猫在桌子上"]
VOCABULARY = 1000  # above every id of the tokenizers here
WIDTH = 16


def _ids(*marks: str, pieces: list[str] = CHARACTERS) -> dict[str, int]:
    return {piece: piece_id for piece_id, piece in enumerate(dict.fromkeys([*marks, *pieces]))}


def _scores(*marks: str) -> list[tuple[str, float]]:
    return [(piece, -1.0) for piece in _ids(*marks)]


def tokenizer_like(name: str) -> PreTrainedTokenizerBase:
    """A tokenizer that marks and pads as the one of that name on the hub does."""
    if "SigLIP2" in name:
        gemma = GemmaTokenizer(_ids("<pad>", "<eos>", "<bos>", "<unk>"), merges=[])
        gemma.add_bos_token, gemma.add_eos_token, gemma.padding_side = False, True, "right"
        return gemma
    if "SigLIP" in name:  # its padding is its end mark
        return T5Tokenizer(_scores("<pad>", "</s>", "<unk>"), pad_token="</s>", extra_ids=0)
    byte_characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    hub = {
        "bert-base-uncased": lambda: BertTokenizer(
            _ids("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", pieces=_word_pieces())
        ),
        "google/mt5": lambda: T5Tokenizer(_scores("<pad>", "</s>", "<unk>"), extra_ids=0),
        "facebook/nllb": lambda: NllbTokenizer(_ids("<s>", "<pad>", "</s>", "<unk>"), merges=[]),
        "facebook/xlm-v": lambda: XLMRobertaTokenizer(_scores("<s>", "<pad>", "</s>", "<unk>")),
        "xlm-roberta": lambda: XLMRobertaTokenizer(_scores("<s>", "<pad>", "</s>", "<unk>")),
        "roberta-base": lambda: RobertaTokenizer(
            _ids("<s>", "<pad>", "</s>", "<unk>", "<mask>", pieces=byte_characters), merges=[]
        ),
    }
    return next(make for start, make in hub.items() if name.startswith(start))()


def _word_pieces() -> list[str]:
    return [*CHARACTERS, *(f"##{character}" for character in CHARACTERS)]


def text_model_config_like(name: str) -> PreTrainedConfig:
    """The configuration of a small text model of the architecture of that name on the hub."""
    bert_sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 80,
        "pad_token_id": 1,
    }
    hub = {
        "google/mt5": lambda: MT5Config(
            vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=24, num_layers=2, num_heads=2, pad_token_id=0
        ),
        "facebook/nllb": lambda: M2M100Config(
            vocab_size=VOCABULARY,
            d_model=WIDTH,
            encoder_layers=2,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
        ),
        "xlm-roberta": lambda: XLMRobertaConfig(**bert_sizes),
        "roberta-base": lambda: RobertaConfig(**bert_sizes),
    }
    return next(make for start, make in hub.items() if name.startswith(start))()


def save_text_model_like(name: str, folder: Path) -> None:
    """Write a small text model and its configuration where `from_pretrained` finds them."""
    AutoModel.from_config(text_model_config_like(name)).save_pretrained(folder)


def save_random_weights(folder: Path, seed: int = 0) -> Path:
    """Write weights of the model that a folder's `open_clip_config.json` describes, beside it."""
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False, pretrained_text=False)
    path = folder / "open_clip_model.safetensors"
    save_model(fill(model, seed), str(path))
    return path
