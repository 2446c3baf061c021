"""Layouts of figures on the quality of maps and masks."""

from __future__ import annotations

from layout_parts import Columns, Region, columns_of, sentence, sets_side_by_side

HELDOUT, NEWARTIST = "heldout", "newartist"


def both(figure: str) -> str:
    """Return the format of a score of both sets in one cell, without intervals."""
    return f"{{{HELDOUT}[{figure}].short}} / {{{NEWARTIST}[{figure}].short}}"


def percent(figure: str, set_name: str) -> str:
    """Return the format of a score in per cent, with half its interval."""
    return f"{{{set_name}[{figure}].percent_half}}"


GLANCED_MAPS = (
    *("LeGrad, last 4", "GradCAM, last block", "CLS attention", "patch-text similarity", "centre prior"),
)
GLANCED_VARIANTS = (
    *("plain", "refined", "background, argmax", "default", "one pass", "one pass, argmax"),
    "the demo's configuration",
)
GLANCE = {
    "variant": "{variant}",
    "`heldout`": percent("mean_iou", HELDOUT),
    "`newartist`": percent("mean_iou", NEWARTIST),
    "over `refined`": f"{{{HELDOUT}[difference].signed_percent_half}} / "
    f"{{{NEWARTIST}[difference].signed_percent_half}}",
    "CPU ms an image": "{heldout[cpu_ms_an_image]:.0f} / {newartist[cpu_ms_an_image]:.0f}",
}
ABLATION = {
    "variant": "{variant}",
    "`heldout`: mIoU": percent("mean_iou", HELDOUT),
    "difference": f"{{{HELDOUT}[difference].signed_percent_half}}",
    "precision": "{heldout[precision].percent}",
    "recall": "{heldout[recall].percent}",
    "kept": "{heldout[coverage].percent}",
    "boundary F": "{heldout[boundary_f].percent}",
    "AP of the maps": "{heldout[map_average_precision].short}",
    "`newartist`: mIoU": percent("mean_iou", NEWARTIST),
    "difference ": f"{{{NEWARTIST}[difference].signed_percent_half}}",
    "AP of the maps ": "{newartist[map_average_precision].short}",
    "CPU ms an image": "{heldout[cpu_ms_an_image]:.0f} / {newartist[cpu_ms_an_image]:.0f}",
}
MAPS = {
    "map": "{map}",
    "pointing": both("pointing"),
    "IoU at 0.5": both("iou_at_half"),
    "IoU Otsu": both("iou_otsu"),
    "IoU, best cut": both("iou_best"),
    "AP": both("average_precision"),
    "own object of two": both("own_object"),
}
HALVES = {
    "half of the 95 % interval": "{map}",
    **{title: form.replace(".short}", ".half}") for title, form in list(MAPS.items())[1:]},
}
MASKS = {
    "set": "`{set}`",
    "mIoU": "{mean_iou.short_half}",
    "mIoU with background": "{mean_iou_with_background.short_half}",
    "IoU per prompt": "{iou.short_half}",
    "boundary F": "{boundary_f.short_half}",
    "precision": "{precision.short_half}",
    "recall": "{recall.short_half}",
}
RECOGNITION = {
    "recognition of 64 classes": "`{set}`",
    "top-1": "{top1.short_half}",
    "R@n": "{recall_at_n.short_half}",
    "mAP": "{mean_average_precision.short_half}",
    "AUROC present / absent": "{auroc.short_half}",
}
ORDERS = {
    "deletion, most relevant first": "deletion_positive",
    "deletion, least first": "deletion_negative",
    "insertion, most relevant first": "insertion_positive",
    "insertion, least first": "insertion_negative",
}

FURTHER_SETS = ("stuff", "thirdartist", "duplicates")
FURTHER = {
    "variant": "{variant}",
    **{
        f"`{name}`{what}": form.format(name)
        for name in FURTHER_SETS
        for what, form in (
            (": mIoU", "{{{}[mean_iou].percent_half}}"),
            (", difference", "{{{}[difference].signed_percent_half}}"),
            (", AP of the maps", "{{{}[map_average_precision].short}}"),
        )
    },
}
NESTED = {
    "contrast": "{way}",
    "`heldout`: single captions": percent("single", HELDOUT),
    "joined caption": percent("joined", HELDOUT),
    "`newartist`: single captions": percent("single", NEWARTIST),
    "joined caption ": percent("joined", NEWARTIST),
}
ACCURACY_UNDER_PERTURBATION = {"map": "{map}", **{order: both(test) for order, test in ORDERS.items()}}
PRESENCE = {
    "score": "{score}",
    "`heldout`": "{heldout[auroc].span}",
    "`newartist`": "{newartist[auroc].span}",
}
LABEL_MAPS = {
    "label maps": "{label_maps}",
    "mIoU over 64 classes": "{classes_only.span}",
    "with background": "{with_background.span}",
}


LABEL_MAP_ERRORS: Columns = {
    "label maps": "{label_maps}",
    "wrong at outlines": "{at_outlines:.1%}",
    "objects missed": "{missed:.1%}",
    "other class": "{confused:.1%}",
    "background invented": "{invented:.1%}",
    "IoU of small objects": "{small_iou:.3f}",
    "of larger ones": "{large_iou:.3f}",
}


def by_weights(weights: str) -> dict[str, Region]:
    """Return the regions of figures that are measured with old and with new weights."""
    scores, ablation, nested, presence, train_demo = (
        f"python tests/bench/{program}.py --weights {weights} --write"
        for program in ("demo_scores", "ablation", "nested_captions", "presence_filters", "train_demo")
    )

    def of_scores(*parts: object) -> Region:
        return Region(f"demo_scores-{weights}", parts, scores)  # type: ignore[arg-type]

    return {
        f"train-demo-{weights}": Region(
            f"train_demo-{weights}",
            [
                columns_of("label_maps", LABEL_MAPS),
                sentence(
                    "The student reaches {student_share_of_supervised:.1%} of its twin's mIoU; over the "
                    "pseudo-masks, which are given the classes: {student_minus_masks.signed_percent_half}, "
                    "and with the classes known {student_minus_masks_classes_known.signed_percent_half}.",
                    "comparison",
                ),
                columns_of("errors", LABEL_MAP_ERRORS),
            ],
            train_demo,
        ),
        f"demo-maps-{weights}": of_scores(
            sets_side_by_side("maps", "map", MAPS),
            sets_side_by_side("maps", "map", HALVES, GLANCED_MAPS[:1]),
        ),
        f"demo-masks-{weights}": of_scores(columns_of("masks", MASKS)),
        f"demo-recognition-{weights}": of_scores(columns_of("recognition", RECOGNITION)),
        f"ablation-{weights}": Region(
            f"ablation-{weights}",
            [
                sets_side_by_side("variants", "variant", ABLATION),
                sets_side_by_side("variants", "variant", FURTHER),
            ],
            ablation,
        ),
        f"nested-{weights}": Region(
            f"nested_captions-{weights}", [sets_side_by_side("ways", "way", NESTED)], nested
        ),
        **{
            f"perturbation-{table}-{weights}": Region(
                f"perturbation-{weights}",
                [sets_side_by_side(table, "map", ACCURACY_UNDER_PERTURBATION)],
                f"python tests/bench/perturbation.py --weights {weights} --write",
            )
            for table in ("target", "predicted")
        },
        f"presence-{weights}": Region(
            f"presence_filters-{weights}", [sets_side_by_side("scores", "score", PRESENCE)], presence
        ),
    }


REGIONS: dict[str, Region] = {
    "maps-glance": Region(
        "demo_scores-new",
        [sets_side_by_side("maps", "map", MAPS, GLANCED_MAPS)],
        "python tests/bench/demo_scores.py --weights new --write",
    ),
    "masks-glance": Region(
        "ablation-new",
        [sets_side_by_side("variants", "variant", GLANCE, GLANCED_VARIANTS)],
        "python tests/bench/ablation.py --weights new --write",
    ),
    **by_weights("new"),
    **by_weights("old"),
    "train-demo-share": Region(
        "train_demo-new", [sentence("{student_share_of_supervised:.1%}", "comparison")], has_head=False
    ),
}
