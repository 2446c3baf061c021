"""What of a URL may be shown and stored, and what distinguishes one shard from the next."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline import storage
from pipeline.storage.signatures import AZURE_KEYS, SIGNATURE_KEYS
from pipeline.storage.urls import without_secrets

SECRET = "hunter2hunter2"
SIGNED = f"X-Amz-Signature={SECRET}&X-Amz-Credential={SECRET}&token={SECRET}"


@pytest.mark.parametrize(
    "text",
    [
        "https://u:{0}@host/x.tar?{1}",
        "HTTPS://u:{0}@host/x.tar?{1}",
        "@https://u:{0}@host/list.txt?{1}",
        "@@https://u:{0}@host/list.txt?{1}",
        " \thttps://u:{0}@host/x.tar?{1}",
        "ht\ntps://u:{0}@host/x.tar",
        "https:/u:{0}@host/x.tar?{1}",
        "https:u:{0}@host/x.tar?{1}",
        "s3://id:{0}@bucket/x.tar?session_token={0}",
        "S3://id:{0}@bucket/x.tar",
        "s3://id:{0}/with/slashes@bucket/x.tar",
        "gs://{0}@bucket/x.tar",
        "file://u:{0}@host/x.tar?token={0}",
        "ftp://u:{0}@host/x.tar?{1}",
        "abfss://box@account/x.tar?sv=1&sig={0}",
        "https://host/x.tar?{0}",
        "https://host/x.tar?{0}=",
        "https://host/x.tar?id={0}",
        "https://host/x.tar?X%2DAmz%2DSignature={0}",
        "https://host/x.tar?a=1;token={0}",
        "https://host/x.tar#token={0}",
        "https://[bad/x.tar?token={0}",
        "{{https,http}}://u:{0}@host/x.tar?{1}",
        "{{https://u:{0}@a,https://u:{0}@b}}/x.tar?{1}",
        "http{{s,}}://u:{0}@host/{{00000..99999}}.tar?{1}",
        "https://{{h/a,u:{0}@h/b}}.tar",
        "{{a,b}}{{c,d}}{{{{e,f}},{{g..z}}}}{{h..z}}ttps://u:{0}@host/x?{1}",
        "https://u:{0}@host/{{0..9.tar?{1}",
        "https://u:{0}{{@host/0.tar",
        "@{{https,http}}://u:{0}@host/x.tar",
        "pipe:curl -H 'Authorization: {0}' https://u:{0}@host/x.tar?{1}",
        "pipe:curl {0}",
        "pipe:curl '{0}",
        "PIPE: env T={0} cat x.tar",
        "pip{{e:,f}}cat {0} x.tar",
        "{{pipe:,x}}cat {0} x.tar",
    ],
)
def test_a_secret_is_not_shown_wherever_it_is(text):
    shown = storage.shown_url(text.format(SECRET, SIGNED))
    assert SECRET not in shown
    assert storage.shown_url(shown) == shown


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("out/demo", "out/demo"),
        ("/data/100% of #1?.tar", "/data/100% of #1?.tar"),
        ("data:v1/{a,b}.tar", "data:v1/{a,b}.tar"),
        ("/data/{0..9}.tar", "/data/{0..9}.tar"),
        ("user@site/é 漢.tar", "user@site/é 漢.tar"),
        ("s3://bucket/a#b?.tar", "s3://bucket/a#b?.tar"),
        ("https://host/{0..9}.tar", "https://host/{0..9}.tar"),
        ("https://HOST:8080/x.tar?id=1#part", "https://host:8080/x.tar?id=~6b86b273ff34fce1"),
        ("pipe:cat /data/x.tar", "pipe:/data/x.tar"),
        ("{a,https://u:p@host/b}.tar", "a.tar, https://host/b.tar"),
    ],
)
def test_what_is_no_secret_stays_as_it_is(url, shown):
    assert storage.shown_url(url) == shown


@settings(max_examples=300)
@example("\x1bPIPE://")
@given(
    st.text(max_size=60) | st.from_regex(r"[@ ]?(https?|S3|pipe|\{s3,gs\}):/{0,3}[-{},.?=&@:'/a-z~0-9]{0,40}")
)
def test_no_text_makes_it_fail_and_shown_twice_is_shown_once(text):
    shown = storage.shown_url(text)
    assert "{" in text or storage.shown_url(shown) == shown
    assert not set(shown) & set("\n\r\x1b")


@pytest.mark.parametrize("key", sorted(SIGNATURE_KEYS | {"x-amz-date", "x-goog-expires", "X-OSS-signature"}))
def test_a_url_that_was_signed_again_is_the_same_shard(key):
    first, second = (f"https://host/dl?id=7&{key}={number}" for number in "12")
    assert storage.shard_name(first) == storage.shard_name(second)
    assert storage.shard_id(first) == storage.shard_id(f"https://host/dl?{key.upper()}=3&id=7")
    assert storage.shard_name(f"https://host/dl?{key}=1") == "https://host/dl"


def test_azures_short_names_are_a_signature_only_beside_one():
    signed = "&".join(f"{key}=1" for key in sorted(AZURE_KEYS))
    assert storage.shard_name(f"https://host/x.tar?{signed}&sig=abc") == "https://host/x.tar"
    assert storage.shard_id("https://host/dl?se=1") != storage.shard_id("https://host/dl?se=2")


def test_urls_that_differ_only_in_their_query_are_two_shards_and_show_as_two():
    urls = [f"https://host/dl?id={number}" for number in range(1000)]
    assert (
        len({storage.shard_name(url) for url in urls}) == len({storage.shard_id(url) for url in urls}) == 1000
    )


@pytest.mark.parametrize(
    ("url", "identifier"),
    [
        ("/data/a b.tar", "a_b-1d088faa"),
        ("https://host/x.tar", "x-a298f3fe"),
        ("https://u:p@host/x.tar?X-Amz-Signature=1", "x-a298f3fe"),
        ("s3://bucket/in/0.tar", "0-1c3bf6b6"),
        ("pipe:cat /data/0.tar", "0-304f7ab5"),
    ],
)
def test_a_shard_without_a_query_keeps_the_id_it_always_had(url, identifier):
    assert storage.shard_id(url) == identifier


@pytest.mark.parametrize(
    "error",
    [
        "HTTP Error 302: Found - Redirection to url 'ftp://u:{0}@host/x?sig={0}' is not allowed",
        "InvalidURL: URL can't contain control characters. '/x?token={0}' (found at least ' ')",
        "access denied for u:{0}",
        "signature {0} does not match",
    ],
)
def test_an_error_is_reported_without_the_secrets_of_any_url_in_it(error):
    url = f"https://u:{SECRET}@host/x.tar?X-Amz-Signature={SECRET}"
    assert SECRET not in without_secrets(OSError(error.format(SECRET)), url)


def test_text_that_was_made_showable_stays_as_it_is():
    shown = storage.shown_url("https://host/dl?id=1")
    for text in (f"{shown}: cannot be read", f"see {shown}, then ({shown}).", f"{shown}; 'x' {shown}?"):
        assert storage.shown_text(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("file:///data/%2A.tar", "file:///data/*.tar"),
        ("left: file:///a%20b/0.tar, file:///%C3%A4.tar", "left: file:///a b/0.tar, file:///ä.tar"),
        ("file:///a%0Ab.tar: cut", "file:///a\\x0ab.tar: cut"),
        ("https://host/%2A.tar", "https://host/%2A.tar"),
        ("100%2A", "100%2A"),
    ],
)
def test_local_paths_are_shown_as_they_were_typed(text, shown):
    assert storage.with_plain_paths(text) == shown
