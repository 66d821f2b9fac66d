"""Secrets leave a text, whatever form they come in; everything else stays as it is."""

import json
import re
from base64 import b64encode
from urllib.parse import quote

import pytest

from backend.jobs import redact as module
from backend.jobs.redact import Redactor, redact, redact_all, secret_values

# Made up: right in shape, wrong in content.
HF = "hf_" + "QdTestTokenNotReal0123456789abcdef"
SECRETS = {
    "hub token": (f"using {HF} now", HF),
    "hub token in an address": (f"GET https://user:{HF}@huggingface.co/x", HF),
    "hub token as user": (f"git clone https://{HF}@huggingface.co/x", HF),
    "organisation token": ("api_org_QdTestTokenNotReal0123456789", "QdTestTokenNotReal"),
    "sk": ("key sk-proj-NotReal0123456789abcdefghij", "NotReal0123456789"),
    "github": ("ghp_NotReal0123456789abcdefghijklmnopqr", "NotReal0123456789"),
    "github, fine": ("github_pat_11NOTREAL0_0123456789abcdefghij", "NOTREAL0_0123"),
    "aws id": ("id AKIANOTREAL012345678"[:23], "NOTREAL0123456"),
    "aws pair": ("aws_secret_access_key = notReal/0123456789+abcdefghijklmnopqrstuv", "notReal/0123456789"),
    "bearer": ("headers: {'Authorization': 'Bearer notreal0123.abc-def'}", "notreal0123"),
    "bearer alone": ("sent bearer notreal0123456", "notreal0123456"),
    "basic": ("Authorization: Basic bm90OnJlYWwxMjM0", "bm90OnJlYWwx"),
    "authorization, plain": ('"authorization": "notreal01"', "notreal01"),
    "basic auth in an address": ("http://proxyuser:pa55w0rd@proxy.example:3128/", "pa55w0rd"),
    "password with @": ("postgres://u:p@ss-word@db.example/x", "ss-word"),
    "web token": ("eyJhbGciOiJIUzI1NiJ9.eyJub3QiOiJyZWFsIn0.c2lnbmF0dXJlbm90cmVhbA", "eyJub3QiOiJyZWFsIn0"),
    "signed address": ("https://cdn.example/f?Expires=1&Signature=NotReal~0-1__&Key-Pair-Id=K1", "NotReal~0-1__"),
    "signed address, aws": ("https://s3.example/f?X-Amz-Signature=0123notreal4567&x=1", "0123notreal4567"),
    "dump": ("SOME_SERVICE_TOKEN=notreal-0123", "notreal-0123"),
    "dump of a dict": ("{'WANDB_API_KEY': 'notreal0123456789', 'PATH': '/bin'}", "notreal0123456789"),
    "dump, json": ('{"DB_PASSWORD": "not real, 0123", "x": 1}', "not real"),
    "password argument": ("login(user='u', password='x')", "'x'"),
    "secret": ("client_secret: notreal01", "notreal01"),
    "api key": ("api-key=notreal01", "notreal01"),
    "token argument": ("from_pretrained(m, token='notreal0123456789abcdef')", "notreal0123456789"),
    "cookie": ("Set-Cookie: session=notreal01; Path=/", "notreal01"),
    "private key": (
        "x\n-----BEGIN RSA PRIVATE KEY-----\nbm90cmVhbA\n-----END RSA PRIVATE KEY-----\nafter",
        "bm90cmVhbA",
    ),
    "private key, open": ("-----BEGIN OPENSSH PRIVATE KEY-----\nbm90cmVhbA\n", "bm90cmVhbA"),
    "private key in json": (r'"-----BEGIN PRIVATE KEY-----\nbm90cmVhbA\n-----END PRIVATE KEY-----\n"', "bm90cmVhbA"),
    "slack": ("xoxb-0123456789-notreal", "notreal"),
    "google": ("AIzaNotReal0123456789abcdefghijklmnopqr", "NotReal0123"),
}


@pytest.mark.parametrize("name", SECRETS)
def test_secrets_by_shape_and_by_place(name):
    text, secret = SECRETS[name]
    assert secret in text, "the test itself is wrong"
    clean = redact(text)
    assert secret not in clean and "redacted]" in clean
    # the same in the middle of a traceback, and as the last of several
    assert secret not in redact(f"Traceback (most recent call last):\n  File x\nValueError: {text}\n\nmore {text}")


@pytest.mark.parametrize(
    "text",
    [
        "Setting `pad_token_id` to `eos_token_id`:2 for open-end generation.",
        "tokens: 4096, num_tokens=131072, max_new_tokens: 128, tokens/s = 81.2",
        "special_tokens_map.json and tokenizer.json saved; tokenizer: LlamaTokenizerFast",
        "Token indices sequence length is longer than the specified maximum (3000 > 2048)",
        "bos_token='<s>' eos_token='</s>' pad_token: <pad>",
        "PROMPT_TOKENS: 16  NEW_TOKENS: 128",
        "past_key_values, key_states, k_proj, key: value",
        "hf_hub_download and hf_transfer are on; hf_device_map={'': 'cpu'}",
        "https://huggingface.co/Qwen/Qwen2.5-0.5B/resolve/main/config.json?download=true",
        "mail to someone@example.org, layer model.layers.3@4bit",
        "task-sk-1 risk-averse; a bearer of news",
        "KeyError: 'model.layers.0'; use_auth_token=True; token=None",
        "quantize 3/24 model.layers.2 error 1.2e-02 (round-to-nearest 5.0e-02)",
        "commit 0f1e2d3c4b5a69788796a5b4c3d2e1f001234567",
    ],
)
def test_what_logs_of_models_are_full_of_stays(text):
    assert redact(text) == text


def test_values_of_telling_variables_whatever_they_look_like(monkeypatch):
    value = 'Zw0lf Boxkämpfer/"jagen"&x'
    monkeypatch.setenv("QD_TEST_SERVICE_KEY", value)
    monkeypatch.setenv("QD_TEST_FLAG_TOKEN", "1")
    for form in (value, quote(value, safe=""), json.dumps(value), repr(value)):
        text = f"a {form} b 1 c"
        assert "jagen" not in redact(text), form
        assert redact(text).endswith("b 1 c")
    assert value not in json.dumps({"message": redact(f"failed with {value}")})


def test_a_key_of_several_lines_in_a_variable_is_known_line_by_line():
    body = [b64encode(bytes([n]) * 24).decode() for n in range(3)]
    values = secret_values({"DEPLOY_KEY": "\n".join(body), "TOKENIZERS_PARALLELISM": "false", "PATH": "/usr/bin"})
    redactor = Redactor(values)
    for line in body:
        assert redactor(f"read {line}") == "read [redacted]"
    assert "false" not in values and "/usr/bin" not in values


def test_of_two_values_the_longer_one_is_taken_whole():
    assert Redactor(["secret-1", "secret-1-extended"])("x secret-1-extended y secret-1") == "x [redacted] y [redacted]"


def test_lines_and_text_agree(monkeypatch):
    monkeypatch.setenv("QD_TEST_TOKEN", "correct horse")
    lines = [*(text for text, _ in SECRETS.values() if "\n" not in text), "plain", "correct horse", ""]
    assert module.environment_redactor().lines(lines) == [redact(line) for line in lines]
    assert module.environment_redactor().lines(["a", "b"]) == ["a", "b"]


def test_every_text_of_an_event_is_redacted_and_the_rest_is_kept():
    event = {"t": 1.5, "step": 3, "message": f"at {HF}", "notes": [f"n {HF}", None, True], "at": {"password": "k"}}
    clean = {
        "t": 1.5,
        "step": 3,
        "message": "at [redacted]",
        "notes": ["n [redacted]", None, True],
        "at": {"password": "k"},
    }
    assert redact_all(event) == clean and HF in event["message"]


def test_redacting_twice_changes_nothing_more():
    for text, _ in SECRETS.values():
        assert redact(redact(text)) == redact(text)


@pytest.mark.parametrize(
    "piece", ["A_", "://", "key=", "token: '", "authorization:", "-----BEGIN PRIVATE KEY-----", "eyJ.", "_KEY_A", '":"']
)
def test_hostile_text_takes_no_quadratic_time(piece):
    """A pattern that goes back over 300 kB for each of its beginnings would not come to an end."""
    text = piece * (300_000 // len(piece))
    redact(text)
    redact(text + " x" + "\n" + "A" * 100_000)


def test_every_rule_can_be_reached():
    """The words that are looked for first must be part of what their pattern matches."""
    unused = {rule.pattern.pattern for rule in module._RULES}
    for text, _ in SECRETS.values():
        for rule in module._RULES:
            if rule.pattern.search(text):
                unused.discard(rule.pattern.pattern)
                assert any(word in text.lower() for word in rule.words), (text, rule.pattern.pattern)
    assert not unused, [re.sub(r"\s", "", pattern)[:60] for pattern in unused]
