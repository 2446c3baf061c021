"""A fine-tuned checkpoint, and a LoRA that is merged into the weights.

python legrad/examples/fine_tuned.py [FOLDER]
"""

# %% The bundled model. A real one: MODEL = ("ViT-B-16", "laion2b_s34b_b88k"), a name and a tag of open_clip.
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import legrad
from legrad.examples.demo_data import load, name_and_weights, output_folder, scenes

MODEL = "demo"
OUT = output_folder("fine_tuned")
path, texts = scenes(OUT, 1)[0]
image = Image.open(path)
explainer = load(MODEL)
before = legrad.explain_image(explainer, image, texts)


# %% A LoRA on one linear layer of the vision tower, with random weights in place of trained ones
class LoraLinear(nn.Module):
    """A linear layer and a product of two thin matrices."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.up = nn.Parameter(torch.randn(base.out_features, rank) / rank**0.5)

    def forward(self, inputs: Tensor) -> Tensor:
        """Add the product to the layer's output."""
        outputs: Tensor = self.base(inputs) + inputs @ self.down.T @ self.up.T
        return outputs

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Return the layer with the product added to its weights."""
        self.base.weight += self.up @ self.down
        return self.base


torch.manual_seed(0)
mlp = explainer.model.visual.transformer.resblocks[-1].mlp  # type: ignore[union-attr, index]
mlp.c_fc = LoraLinear(mlp.c_fc)

# %% As long as it is not merged, the model computes something else than its classes define, and is refused.
try:
    legrad.explain_image(explainer, image, texts)
except legrad.UnsupportedModelError as error:
    print("refused:", error)

# %% Merged, it is explained; the same explainer follows. With peft: model = peft_model.merge_and_unload().
mlp.c_fc = mlp.c_fc.merged()
merged = legrad.explain_image(explainer, image, texts)
print("largest change of a heat map:", round(float((merged.heatmaps - before.heatmaps).abs().max()), 3))
merged.side_by_side().save(OUT / "merged.png")

# %% A checkpoint file of the fine-tuned model is loaded under the name of its architecture.
checkpoint = OUT / "fine-tuned.safetensors"
save_file({name: weight.contiguous() for name, weight in explainer.model.state_dict().items()}, checkpoint)
loaded = legrad.LeGrad.from_open_clip(name_and_weights(MODEL)[0], str(checkpoint))
from_file = legrad.explain_image(loaded, image, texts)
torch.testing.assert_close(from_file.heatmaps, merged.heatmaps, atol=1e-4, rtol=0)
