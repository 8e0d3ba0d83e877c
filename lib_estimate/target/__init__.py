"""From a request to what is learnt from: conditionings, recorded latents and queries, sentences, the error there."""
