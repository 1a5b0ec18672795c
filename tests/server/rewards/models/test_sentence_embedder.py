"""The sentence encoder on the embedded model: unit rows, independence of the batch, meaning, odd texts."""

import json
from pathlib import Path

import numpy as np
import pytest

from guiderail.guides.core.errors import GuiderailError
from guiderail.server.rewards.models import sentence_embedder
from guiderail.server.rewards.models.sentence_embedder import SentenceEmbedder

RAIN = ["It will rain tomorrow.", "Tomorrow we expect showers.", "My cat sleeps on the sofa all day."]
TEXTS = [*RAIN, "", " ", "word " * 400, "naïve café 日本語 🌧️", "a\nb\tc", "x" * 5000]


@pytest.fixture(scope="module")
def model() -> SentenceEmbedder:
    return SentenceEmbedder()


async def test_rows_are_unit_vectors_in_the_order_of_the_texts(model: SentenceEmbedder) -> None:
    rows = await model.embed(TEXTS)
    assert rows.shape == (len(TEXTS), 384)
    assert rows.dtype == np.float32
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert (await model.embed([])).shape == (0, 384)


async def test_a_row_does_not_depend_on_its_batch(model: SentenceEmbedder, monkeypatch: pytest.MonkeyPatch) -> None:
    together = await model.embed(TEXTS)
    for text, row in zip(TEXTS, together, strict=True):
        assert np.abs((await model.embed([text]))[0] - row).max() < 1e-5
    monkeypatch.setattr(sentence_embedder, "BATCH", 3)  # several batches instead of one
    assert np.abs(await model.embed(TEXTS[::-1]) - together[::-1]).max() < 1e-5


async def test_what_means_the_same_is_nearer(model: SentenceEmbedder) -> None:
    rows = await model.embed([*RAIN, "How do I bake bread?", "What is a good recipe for a loaf?"])
    cosines = rows @ rows.T
    assert cosines[0, 1] > 0.6 > 0.3 > cosines[0, 2]
    assert cosines[3, 4] > 0.5 > 0.3 > cosines[3, 0]


async def test_it_is_the_recipe_of_sentence_transformers(model: SentenceEmbedder) -> None:
    """Mean of the last states, special tokens included, of one text without padding; then length one."""
    import torch
    from transformers import BertModel, BertTokenizerFast

    folder = sentence_embedder._embedded()
    tokenizer, bert = BertTokenizerFast.from_pretrained(folder), BertModel.from_pretrained(folder).eval()
    for text in TEXTS[:6]:
        batch = tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
        with torch.no_grad():
            mean = bert(**batch).last_hidden_state[0].mean(0).numpy()
        assert np.abs((await model.embed([text]))[0] - mean / np.linalg.norm(mean)).max() < 1e-5


async def test_a_long_text_is_cut_after_256_word_pieces(model: SentenceEmbedder) -> None:
    rows = await model.embed(["word " * 254, "word " * 254 + "volcano " * 50, "word " * 253 + "volcano"])
    assert np.abs(rows[0] - rows[1]).max() < 1e-5
    assert np.abs(rows[0] - rows[2]).max() > 1e-3


async def test_what_cannot_be_loaded_is_said(tmp_path: Path) -> None:
    with pytest.raises(GuiderailError, match="does not load"):
        await SentenceEmbedder(str(tmp_path)).embed(["x"])
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    with pytest.raises(GuiderailError, match="mean"):
        await SentenceEmbedder(str(tmp_path)).embed(["x"])
