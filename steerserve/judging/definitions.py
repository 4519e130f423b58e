"""What the report's numbers mean, in the words of the page."""

from __future__ import annotations

__all__ = ["DEFINITIONS"]

DEFINITIONS = {
    "explained variance": "1 − E‖x − x̂‖²/(E‖x‖² − ‖Ex‖²): centred, so that a large mean helps nobody.",
    "R²": "1 − E‖x − x̂‖²/E‖x‖²: uncentred, never the lower of the two. Papers differ in which they give.",
    "L0": "active features per token.",
    "dead, dense": "share of features that fired on no token, and on more than a tenth of the tokens.",
    "CE score": "(CE_zero − CE_sae)/(CE_zero − CE_clean), with the reconstruction or zeros as the stream of "
    "ordinary tokens.",
    "KL score": "(KL_zero − KL_sae)/KL_zero, of next-token distributions from the clean ones.",
    "MMCS, MCC": "mean best cosine of planted features with latents, and mean |cosine| of the best matching.",
    "latent, probe": "the best single latent, its threshold chosen on the other half of the texts, against "
    "logistic regression on the stream: F1 and AUROC on held-out tokens.",
    "F1 by text": "latent / probe on the mean of a text's tokens.",
    "latents": "features that reach an F1 of 0.3 for the concept by themselves.",
    "main": "latents that a k-sparse probe needs, until another adds less than 0.03 F1 (SAEBench's split "
    "features).",
    "absorption": "mean share of the concept's projection that other latents carry in place of the main "
    "ones; full: share of tokens on which the main ones are silent and one other carries it "
    "(arXiv:2409.14507, SAEBench).",
    "TPP": "how far ablating a concept's top latents lowers its own probe's accuracy, less what it does to "
    "the other probes (SAEBench).",
    "monosemanticity": "mean similarity (tf-idf) of two texts, weighted by how strongly a feature fires on "
    "both (arXiv:2504.02821); chance is the same without weights.",
    "concept": "what a text classifier (2 × its probability), or the caller's labeller, says of the text.",
    "fluency": "2 × the ratio of unsteered to steered perplexity under the unsteered model, × the ratio of "
    "steered to unsteered share of distinct bigrams, each at most 1.",
    "instruct": "2 × how much the prompt foretells the text (nats per token, unsteered model), relative to "
    "unsteered text, between 0 and 1.",
    "overall": "harmonic mean of the three for each text, then the mean. Strengths were chosen on other "
    "prompts. ± is the 95 % interval of the mean difference over concepts. Scores are computed, so that they "
    "compare within this report and not with those that a language model gave.",
}
