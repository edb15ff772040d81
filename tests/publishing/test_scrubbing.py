"""What is taken out of a report before others read it, and what is not."""

from __future__ import annotations

import pytest

from quantkit.masking import hide_tokens
from quantkit.publishing.scrubbing import hide_local_paths


@pytest.mark.parametrize(
    "token",
    [
        "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH",
        "hf_oauth_eyJhbGciOi.eyJzdWIi-x_y.abc",
        "api_org_abcdefghijklmnopqrst",
        "ghp_abcdefghijklmnopqrst0123456789",
        "ghs_abcdefghijklmnopqrst0123456789",
        "github_pat_11ABCDEFG0abcdefghijk_lmn",
        "glpat-abc_defghijklmn-opqrst",
        "Bearer abcdefghijklmnop.qrst",
    ],
)
def test_what_looks_like_a_token_is_taken_out(token: str) -> None:
    """Wherever it stands."""
    assert hide_tokens(f"KEY={token}, and more") == "KEY=[token], and more"


@pytest.mark.parametrize(
    "text",
    [
        "hf-internal-testing/tiny-random-LlamaForCausalLM",
        "The bearer of the letter went on.",
        "global-attention-window-of-4096",
        "https://huggingface.co/acme/model?library=vllm",
    ],
)
def test_what_only_begins_like_one_stays(text: str) -> None:
    """Names of accounts and models, and the text of an evaluation."""
    assert hide_tokens(text) == text


def test_a_known_token_and_what_is_a_key_in_an_address_are_taken_out() -> None:
    """Whatever the token looks like."""
    said = "s3cret at https://me:pass@host/x and https://host/y?X-Signature=abc"
    assert hide_tokens(said, "s3cret") == "[token] at [token]host/x and https://host/y?[token]"


def test_a_path_is_hidden_where_it_is_one() -> None:
    """The working folder /app is no part of a Hub id or an address that ends alike."""
    document = {"model": "acme/app", "data": "/app/texts/a.txt", "url": "https://host.co/app/x"}
    assert hide_local_paths(document, ["/app"]) == {**document, "data": "app/texts/a.txt"}
    assert hide_local_paths("see '/home/me/x' in /home/me", []) == "see '~/x' in ~"
