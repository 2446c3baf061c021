"""Compare the heat maps of this package with those of the authors', which cannot be in the same environment.

Run `save` with the same arguments in an environment of each, then `compare` in either:

    python legrad/examples/compare_maps.py save ours.npz --image cats.jpg --text "a cat" --text "a dog"
    python legrad/examples/compare_maps.py save theirs.npz --image cats.jpg --text "a cat" --text "a dog"
    python legrad/examples/compare_maps.py compare ours.npz theirs.npz

Without a download, the bundled model: --model pipeline/demo/legrad_demo_clip.json --pretrained
pipeline/demo/legrad_demo_clip.safetensors --image-size 224.
"""

import argparse
import hashlib
import json
import logging
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

# what has to be equal in both files, as otherwise the maps are of different things
SAME = ("model", "pretrained", "layers", "image_size", "texts", "images_sha256")
FIELDS = ("images", "text_embeddings", "maps")


def main() -> None:
    """Save maps, or compare saved ones."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = parser.add_subparsers(dest="action", required=True)
    save_parser = actions.add_parser("save", help="explain images with the package of this environment")
    save_parser.add_argument("out", type=Path, metavar="OUT.npz")
    save_parser.add_argument("--image", action="append", required=True, type=Path, metavar="FILE")
    save_parser.add_argument("--text", action="append", required=True)
    save_parser.add_argument("--model", default="ViT-B-16", help="open_clip name, or a JSON configuration")
    save_parser.add_argument("--pretrained", default="laion2b_s34b_b88k", help="tag, or a checkpoint's path")
    save_parser.add_argument("--layers", type=int, default=2, help="number of last blocks")
    save_parser.add_argument(
        "--image-size", type=int, default=448, help="side of the model's input in pixels"
    )
    compare_parser = actions.add_parser("compare", help="print how far two files of `save` differ")
    compare_parser.add_argument("first", type=Path)
    compare_parser.add_argument("second", type=Path)
    arguments = parser.parse_args()
    if arguments.action == "save":
        save(arguments)
    else:
        compare(arguments.first, arguments.second)


def save(arguments: argparse.Namespace) -> None:
    """Write input, text embeddings and maps, with what they were made with."""
    try:
        from legrad import LeWrapper  # type: ignore[attr-defined]  # noqa: F401
    except ImportError:
        explain, package = explain_here, "legrad-pipeline"
    else:
        explain, package = explain_by_authors, "legrad-torch"
    arrays = explain(arguments)
    case = {
        "package": f"{package} {version(package)}",
        "open_clip": version("open_clip_torch"),
        "model": arguments.model,
        "pretrained": arguments.pretrained,
        "layers": arguments.layers,
        "image_size": arguments.image_size,
        "texts": arguments.text,
        "images_sha256": [hashlib.sha256(path.read_bytes()).hexdigest() for path in arguments.image],
    }
    np.savez_compressed(arguments.out, case=np.array(json.dumps(case)), **arrays)  # type: ignore[arg-type]
    print(f"{arguments.out}: {arrays['maps'].shape} maps of {case['package']}, open_clip {case['open_clip']}")


def load(arguments: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Return model, preprocessing and tokenizer, as both releases of open_clip make them."""
    import open_clip

    name, pretrained = arguments.model, arguments.pretrained
    if name.endswith(".json"):
        open_clip.add_model_config(Path(name))
        name = Path(name).stem
    # the release of open_clip that the authors' package needs cannot read these
    is_safetensors = pretrained.endswith(".safetensors")
    logging.disable(logging.WARNING if is_safetensors else logging.NOTSET)  # "initialized randomly"
    model, _, preprocess = open_clip.create_model_and_transforms(name, None if is_safetensors else pretrained)
    if is_safetensors:
        from safetensors.torch import load_file

        model.load_state_dict(load_file(pretrained))
    return model.eval(), preprocess, open_clip.get_tokenizer(name)


def explain_here(arguments: argparse.Namespace) -> dict[str, np.ndarray]:
    """Explain with this package."""
    from PIL import Image

    import legrad

    model, _, tokenizer = load(arguments)
    explainer = legrad.LeGrad(
        model, tokenizer=tokenizer, layers=arguments.layers, image_size=arguments.image_size
    )
    images = explainer.preprocess([Image.open(path) for path in arguments.image])
    texts = explainer.embed_text(arguments.text)
    maps = explainer.heatmaps(images, texts, as_authors=True)
    return {"images": images.numpy(), "text_embeddings": texts.numpy(), "maps": maps.numpy()}


def explain_by_authors(arguments: argparse.Namespace) -> dict[str, np.ndarray]:
    """Explain with the authors' package, one image and text at a time, as all its model types allow."""
    import torch
    from PIL import Image

    from legrad import LePreprocess, LeWrapper  # type: ignore[attr-defined]

    model, preprocess, tokenizer = load(arguments)
    preprocess = LePreprocess(preprocess=preprocess, image_size=arguments.image_size)
    images = torch.stack([preprocess(Image.open(path)) for path in arguments.image])
    with torch.no_grad():
        texts = model.encode_text(tokenizer(arguments.text), normalize=True)
    wrapper = LeWrapper(model, layer_index=-arguments.layers)
    maps = torch.stack(
        [
            torch.stack(
                [wrapper.compute_legrad(text[None], image[None]).detach().squeeze() for text in texts]
            )
            for image in images
        ]
    )
    return {"images": images.numpy(), "text_embeddings": texts.numpy(), "maps": maps.numpy()}


def compare(first: Path, second: Path) -> None:
    """Print one JSON row for the models' input, the text embeddings and the maps."""
    files = [np.load(path) for path in (first, second)]
    cases = [json.loads(str(file["case"])) for file in files]
    for key in SAME:
        if cases[0][key] != cases[1][key]:
            sys.exit(f"{key} differs: {first} has {cases[0][key]!r}, and {second} has {cases[1][key]!r}")
    print(json.dumps({"packages": [case["package"] for case in cases]}))
    for field in FIELDS:
        one, other = (file[field].astype(np.float64) for file in files)
        row = {
            "field": field,
            "shape": one.shape,
            "relative_error": float(np.linalg.norm(one - other) / np.linalg.norm(other)),
            "largest_difference": float(np.abs(one - other).max()),
        }
        print(json.dumps(row))


if __name__ == "__main__":
    main()
