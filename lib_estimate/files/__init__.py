"""Names and files of embeddings: what may be a name, writing that never leaves half a file, reading without trust.

Two formats are written. Each is the one that every reader we know takes (AUTOMATIC1111 1.6 - 1.10, Forge, reForge,
ComfyUI, diffusers):

    .pt           AUTOMATIC1111's dict, in torch's older, non-zip container: the webui's check of pickles refuses the
                  members that a recent torch puts into the zip one. SD1 and SD2 only, because the webui takes every
                  key of an SDXL `.pt` for a tensor and would leave no room for the record.
    .safetensors  one tensor `emb_params` for SD1 and SD2 (the webui refuses a second), `clip_l` and `clip_g` for SDXL;
                  everything else stands in the header as text.

Read are these two, `.bin`, both containers of torch, and the PNG cards of AUTOMATIC1111.
"""
