"""Transformers and pipelines that are not what their class makes one think are refused before any long work."""

import json
import re
import shutil
from pathlib import Path

import pytest

from adatsq_trt.checkpoints.loading import open_pipeline
from adatsq_trt.errors import MismatchError
from adatsq_trt.settings import PipelineSettings
from tests.tiny_checkpoints import HEIGHT, WIDTH

TRANSFORMER, INDEX, VAE = "transformer/config.json", "model_index.json", "vae/config.json"
GUIDER = "guider/guider_config.json"


@pytest.mark.parametrize(
    ("saved", "file", "changes", "message"),
    [
        ("wan", INDEX, {"expand_timesteps": True}, "expand_timesteps is True, expected False; .* such as Wan 2.1"),
        (
            "wan",
            INDEX,
            {"boundary_ratio": 0.875},
            "boundary_ratio is 0.875 and there is no second transformer",
        ),
        ("wan", TRANSFORMER, {"in_channels": 36}, "in_channels 36 and out_channels 16: it takes a picture or a mask"),
        ("wan", TRANSFORMER, {"image_dim": 1280}, "image_dim is 1280, expected None, as in a transformer that takes"),
        ("wan", TRANSFORMER, {"added_kv_proj_dim": 64}, "added_kv_proj_dim is 64, expected None"),
        ("wan", VAE, {"z_dim": 48}, r"in_channels 16, the VAE '.*config.json' has z_dim 48, which makes 48"),
        ("flux", TRANSFORMER, {"in_channels": 384, "out_channels": 64}, "in_channels 384 and out_channels 64"),  # Fill
        ("flux", TRANSFORMER, {"in_channels": 128, "out_channels": 64}, "in_channels 128 and out_channels 64"),  # Canny
        ("flux", TRANSFORMER, {"patch_size": 2}, "patch_size is 2, expected 1"),
        ("flux", VAE, {"latent_channels": 4}, "in_channels 64, the VAE .* has latent_channels 4, which makes 16"),
        ("z_image", TRANSFORMER, {"siglip_feat_dim": 1152}, "siglip_feat_dim is 1152, expected None"),
        ("qwen_image", TRANSFORMER, {"zero_cond_t": True}, "zero_cond_t is True, expected False"),  # Edit 2511
        ("qwen_image", TRANSFORMER, {"use_layer3d_rope": True}, "use_layer3d_rope is True, expected False"),  # Layered
        ("qwen_image", TRANSFORMER, {"use_additional_t_cond": True}, "use_additional_t_cond is True, expected False"),
        ("qwen_image", TRANSFORMER, {"guidance_embeds": True}, "guidance_embeds is True, expected False"),
        ("qwen_image", TRANSFORMER, {"patch_size": 1}, "in_channels 64 and out_channels 16: it takes a picture"),
        ("qwen_image", TRANSFORMER, {"out_channels": None}, "in_channels 64 and out_channels 256"),
        ("qwen_image", VAE, {"z_dim": 4}, "in_channels 64, the VAE .* has z_dim 4, which makes 16"),
        ("stable_diffusion_3", TRANSFORMER, {"patch_size": 1}, "patch_size is 1, expected 2"),
        (
            "stable_diffusion_3",
            TRANSFORMER,
            {"in_channels": 33},
            "in_channels 33 and out_channels 16: it takes a picture",
        ),
        ("hunyuan_video", TRANSFORMER, {"use_meanflow": True}, "use_meanflow is True, expected False"),
        ("hunyuan_video", TRANSFORMER, {"patch_size": 2}, "patch_size is 2, expected 1"),
        ("hunyuan_video", TRANSFORMER, {"in_channels": 4}, "in_channels 4 and out_channels 4: expected 5 channels of"),
        ("hunyuan_video", GUIDER, {"_class_name": "AdaptiveProjectedGuidance"}, "a guider 'AdaptiveProjectedGuidance'"),
        ("hunyuan_video", GUIDER, {"guidance_rescale": 0.7}, "guidance_rescale = 0.7 is not followed, expected 0.0"),
        (
            "hunyuan_video",
            GUIDER,
            {"use_original_formulation": True},
            "use_original_formulation = True is not followed",
        ),
        ("hunyuan_video", GUIDER, {"stop": 0.5}, "stop = 0.5 is not followed, expected 1.0; save the pipeline with"),
        ("hunyuan_video", GUIDER, {"momentum": 0.5}, "has no option 'momentum'"),
        (
            "fill",
            TRANSFORMER,
            {"in_channels": 64},
            "in_channels 64 and out_channels 64: expected 320 channels of an image",
        ),
        ("fill", TRANSFORMER, {"in_channels": 128}, "in_channels 128 and out_channels 64: expected 320 channels of an"),
        ("fill", TRANSFORMER, {"out_channels": None}, "in_channels 384 and out_channels None: expected 320 channels"),
        (
            "kontext",
            TRANSFORMER,
            {"in_channels": 384, "out_channels": 64},
            "in_channels 384 and out_channels 64: it takes",
        ),
        (
            "wan_image",
            TRANSFORMER,
            {"in_channels": 16},
            "in_channels 16 and out_channels 16: expected 20 channels of an",
        ),
        ("wan_image", TRANSFORMER, {"pos_embed_seq_len": 514}, "pos_embed_seq_len is 514, expected None"),  # two frames
        ("wan_image", TRANSFORMER, {"added_kv_proj_dim": None}, "image_dim is 32 and added_kv_proj_dim None, expected"),
        (
            "wan_frame",
            TRANSFORMER,
            {"added_kv_proj_dim": 64},
            "image_dim is None and added_kv_proj_dim 64, expected both",
        ),
        (
            "wan_image",
            "image_encoder/config.json",
            {"hidden_size": 64},
            "hidden_size 64, expected an encoder whose tokens",
        ),
        (
            "wan_image",
            INDEX,
            {"boundary_ratio": 0.9},
            "boundary_ratio is 0.9 and there is no second transformer",
        ),
        ("wan_image", INDEX, {"expand_timesteps": True}, "expand_timesteps is True, expected False"),
        (
            "wan_image",
            INDEX,
            {"transformer_2": ["diffusers", "WanTransformer3DModel"]},
            "boundary_ratio is None and there is a WanTransformer3DModel as its second transformer",
        ),
        ("flux_2", TRANSFORMER, {"guidance_embeds": False}, "guidance_embeds is False, expected True"),
        ("flux_2", TRANSFORMER, {"patch_size": 2}, "patch_size is 2, expected 1"),
        (
            "flux_2",
            TRANSFORMER,
            {"in_channels": 128, "out_channels": 64},
            "in_channels 128 and out_channels 64: it takes",
        ),
        ("flux_2", VAE, {"latent_channels": 32}, "in_channels 64, the VAE .* has latent_channels 32, which makes 128"),
        ("flux_2_klein", TRANSFORMER, {"guidance_embeds": True}, "guidance_embeds is True, expected False"),
        ("flux_2_klein", INDEX, {"_class_name": "Flux2KleinKVPipeline"}, "is a Flux2KleinKVPipeline with a Flux2Trans"),
        ("chroma", TRANSFORMER, {"patch_size": 2}, "patch_size is 2, expected 1"),
        ("chroma", TRANSFORMER, {"in_channels": 128, "out_channels": 64}, "in_channels 128 and out_channels 64"),
        ("chroma", VAE, {"latent_channels": 4}, "in_channels 64, the VAE .* has latent_channels 4, which makes 16"),
        ("ltx", TRANSFORMER, {"patch_size_t": 2}, "patch_size_t is 2, expected 1"),
        ("ltx", TRANSFORMER, {"in_channels": 32}, "in_channels 32 and out_channels 16: it takes a picture"),
        ("ltx", VAE, {"latent_channels": 4}, "in_channels 16, the VAE .* has latent_channels 4, which makes 4"),
        ("ltx", VAE, {"patch_size": 2}, "a cell of the VAE is 16 pixels and 8 frames, expected 32 and 8"),
        ("ltx", VAE, {"temporal_compression_ratio": 4}, "a cell of the VAE is 32 pixels and 4 frames"),
        ("ltx", VAE, {"decoder_inject_noise": [True, False]}, "this VAE draws noise while it decodes, which is not"),
        ("z_image", TRANSFORMER, {"all_patch_size": [2, 4]}, r"all_patch_size is \[2, 4\], expected \[2\]"),
    ],
)
def test_what_is_not_a_model_of_noise_and_text_is_named(
    request: pytest.FixtureRequest, tmp_path: Path, saved: str, file: str, changes: dict[str, object], message: str
) -> None:
    folder = Path(shutil.copytree(request.getfixturevalue(f"saved_{saved}"), tmp_path / "pipeline"))
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changes))
    with pytest.raises(MismatchError) as refused:
        _ = open_pipeline(PipelineSettings(path=str(folder), height=HEIGHT, width=WIDTH, prompts=("a red",))).outline
    assert re.search(message, str(refused.value))
    assert refused.value.exit_code == 2
