"""
`BridleModel` (ViT-B), forward and backward, against transformers' models of the same size and as many tokens: ASTModel
(which has a second extra token), ViTModel and VideoMAEModel, all with SDPA.

Weights are copied, and outputs compared, where the mathematics is the same (all but ASTModel's positions and tokens).
"""

import torch
from harness import race, run
from transformers import ASTConfig, ASTModel, VideoMAEConfig, VideoMAEModel, ViTConfig, ViTModel

from bridle_hf import BridleConfig, BridleModel


SAMPLES = {"audio": 1, "image": 2, "video": 1}
NUM_FRAMES = 8  # of a clip: 784 tokens


def audio(rounds):
    peer = ASTModel(ASTConfig(frequency_stride=16, time_stride=16, max_length=1024))
    yield from compare("audio", torch.randn(SAMPLES["audio"], 1024, 128), peer, rounds, equal=False)


def image(rounds):
    peer = ViTModel(ViTConfig(layer_norm_eps=1e-6, hidden_dropout_prob=0.0), add_pooling_layer=False)
    yield from compare("image", torch.randn(SAMPLES["image"], 3, 224, 224), peer, rounds)


def video(rounds):
    peer = VideoMAEModel(VideoMAEConfig(num_frames=NUM_FRAMES, layer_norm_eps=1e-6, use_mean_pooling=False))
    yield from compare("video", torch.randn(SAMPLES["video"], NUM_FRAMES, 3, 224, 224), peer, rounds)


def compare(modality, inputs, peer, rounds, equal=True):
    options = {"num_frames": NUM_FRAMES} if modality == "video" else {}
    ours = BridleModel(BridleConfig(modality=modality, **options))
    if equal:
        copy_weights(ours, peer)
        with torch.no_grad():
            expected, found = (model.eval()(inputs).last_hidden_state for model in (peer, ours))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)

    def forward_and_backward(model):
        model.train()(inputs).last_hidden_state.sum().backward()
        model.zero_grad()

    what = f"{modality} encoder, forward and backward, per sample"
    peers = {type(peer).__name__: lambda: forward_and_backward(peer)}
    yield from race(what, lambda: forward_and_backward(ours), peers, rounds, scale=len(inputs))


def copy_weights(ours, peer):
    """Theirs for ours; positions are ours on both sides."""
    state, renamed = {}, {"embeddings.patch_embeddings": "embeddings", "encoder.layer": "layer", "layer.": "layers."}
    renamed |= {"layerss": "layers", "attention.attention": "attention", "query.": "q_proj.", "key.": "k_proj."}
    renamed |= {"value.": "v_proj.", "attention.output.dense": "attention.o_proj", "intermediate.dense": "mlp.fc1"}
    renamed |= {"output.dense": "mlp.fc2", "q_bias": "q_proj.bias", "v_bias": "v_proj.bias"}
    for name, tensor in peer.state_dict().items():
        for theirs, our in renamed.items():
            name = name.replace(theirs, our)
        if "position" not in name:
            state[name] = tensor.flatten(1) if name == "embeddings.projection.weight" else tensor
    missing, unexpected = ours.load_state_dict(state, strict=False)
    assert not unexpected and all("table" in name for name in missing), (missing, unexpected)
    table = ours.embeddings.positions.table
    with torch.no_grad():
        peer.embeddings.position_embeddings[0, -len(table) :].copy_(table)
        peer.embeddings.position_embeddings[0, : -len(table)].zero_()


if __name__ == "__main__":
    run(__doc__, [audio, image, video], rounds=3)
