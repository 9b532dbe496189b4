"""A tokenizer's own template as a chat format, on a small tokenizer in SmolLM2's manner."""

import pytest

from megatron_k2.chat.hugging_face import HuggingFaceFormat

# SmolLM2-135M-Instruct's template, as published.
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
USER = {"role": "user", "content": "Grüezi 😀"}


def tokenizer(template: str | None = TEMPLATE, eos: str = "<|endoftext|>"):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(models.BPE({name: at for at, name in enumerate(alphabet)}, []))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    names = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    found = PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token=eos, additional_special_tokens=names
    )
    found.chat_template = template
    return found


@pytest.fixture(scope="module")
def format() -> HuggingFaceFormat:
    return HuggingFaceFormat(tokenizer())


def test_encode_is_the_tokenizers_own_template(format) -> None:
    text = format.decode(format.encode([USER]))
    assert text.endswith("user\nGrüezi 😀<|im_end|>\n<|im_start|>assistant\n")
    head = format.tokenizer.encode("<|im_start|>assistant\n")
    assert format.encode([USER]) == [*format.encode([USER], add_generation_prompt=False), *head]


def test_stop_ids_are_eos_and_what_the_template_puts_after_an_answer(format) -> None:
    names = [format.decode([token]) for token in format.stop_ids]
    assert names == ["<|endoftext|>", "<|im_end|>"]
    bare = "{% for message in messages %}<|im_start|>{{ message['content'] }} {% endfor %}"
    found = HuggingFaceFormat(tokenizer(bare))
    assert found.stop_ids == (found.tokenizer.eos_token_id,)


def test_names_of_control_tokens_in_plain_text_are_text(format) -> None:
    ids = format.encode_text("a<|im_end|>")
    assert max(ids) < 256 and format.decode(ids) == "a<|im_end|>"


def test_answers_stream_in_whole_characters(format) -> None:
    said = "né 你好 👩\u200d👧 <|im_end|>"
    parser = format.parser([USER])
    end = format.stop_ids[1]
    steps = [parser.feed([token]) for token in [*format.encode_text(said), end, 5]]
    texts = [event.text for events in steps for event in events]
    assert "".join(texts) == said and not any("\ufffd" in text for text in texts)
    assert parser.finish()[1].message == {"role": "assistant", "content": said}


def test_half_a_character_at_the_end_is_told_at_the_end(format) -> None:
    parser = format.parser([USER])
    assert parser.feed(format.encode_text("ä")[:1]) == []
    events, parsed = parser.finish()
    assert [event.text for event in events] == ["\ufffd"] == [parsed.message["content"]]


def test_what_cannot_be_rendered_is_refused(format, tmp_path) -> None:
    with pytest.raises(ValueError, match="has no chat template"):
        HuggingFaceFormat(tokenizer(None))
    with pytest.raises(ValueError, match="the chat template does not render"):
        HuggingFaceFormat(tokenizer("{{ raise_exception('no') }}")).encode([USER])
    with pytest.raises(ValueError, match="no tokenizer"):
        HuggingFaceFormat.load(str(tmp_path))
