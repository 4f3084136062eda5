"""URLs and patterns as users type them: what they name, what is refused, what is shown of them."""

import random
import string
import time

import pytest

from vir.addresses import HIDDEN, expand, is_remote, parts, place, shown
from vir.errors import SettingsError


@pytest.mark.parametrize("text, expected", [
    ("s3://bucket/a.tar", True), ("http://h/a", True), ("HTTPS://h/a", True), ("hf://datasets/a/b", True),
    ("abfs+x.y-z://a", True), ("file:///a/b.tar", False), ("FILE:///a", False), ("file:/a", False), ("/a/b://c", False),
    ("shards/a.tar", False), ("", False), ("a:b", False), ("1s3://a", False), ("pipe:curl x", False)])
def test_what_is_remote(text, expected):
    assert is_remote(text) is expected


@pytest.mark.parametrize("url, expected", [
    ("s3://bucket/train-{0000..1023}.tar", "s3://bucket/train-{0000..1023}.tar"),
    ("/data/part-?.tar#x", "/data/part-?.tar#x"),
    ("hf://datasets/timm/imagenet@main/a@b.tar", "hf://datasets/timm/imagenet@main/a@b.tar"),
    ("https://user:secret@host:8080/a.tar", "https://***@host:8080/a.tar"),
    ("https://secret@host/a.tar", "https://***@host/a.tar"),
    ("https://user:sec@ret@host/a@b.tar", "https://***@b.tar"),
    ("https://user:sec/ret@host/a.tar", "https://***@host/a.tar"),
    ("https://user:sec?ret#x@host/a.tar", "https://***"),
    ("https://user:sec::ret@host/a.tar", "https://***@host/a.tar"),
    ("https://host/a.tar?X-Amz-Signature=secret&b=secret", "https://host/a.tar?***"),
    ("https://host?secret", "https://host?***"),
    ("https://host/a.tar#secret", "https://host/a.tar#***"),
    ("https://host/a.tar?x=https://user:secret@other/?secret", "https://host/a.tar?***"),
    ("https://u:secret@h/a{0..3}.tar?secret::s3://b/c.tar::https://v:secret@i/{x,y}?secret",
     "https://***@h/a{0..3}.tar?***::s3://b/c.tar::https://***@i/{x,y}?***"),
    ("https://u:secret@{a,b}/x", "https://***@{a,b}/x"),
    ("{https://u:secret@a/x?secret,https://u:secret@b/x?secret}", "{https://***"),
    ("/local/a.tar::https://u:secret@h/a", "/local/a.tar::https://***@h/a"),
    ("0.5*https://u:secret@h/a", "0.5*https://***@h/a"),
    ("pipe:curl -H 'Authorization: secret' https://h/a.tar", "pipe:***"),
    ("a.tar::pipe:curl secret", "a.tar::pipe:***"),
    ("| curl secret", "|***"), ("exec:x secret |", "exec:***"), ("curl secret | ", "***|"),
    ("s3://bucket:8080/a@b.tar", "s3://***@b.tar"), ("https://h:80/a?k=se@cret", "https://***"),
    ("https://h:80::https://h:81/a@b", "https://h:80::https://***@b"),
    ("https://u:p@s/s3cret@host/x", "https://***@host/x"), ("https://user:123/4secret@host/x", "https://***@host/x"),
    ("https:/u:secret@h/x", "https:/***@h/x"), ("//u:secret@h/x", "//***@h/x"), ("/data/a:b@c.tar", "/data/a:b@c.tar"),
    ("abfs://train@acct/x/a.tar", "abfs://train@acct/x/a.tar"), ("oci://key:secret@b/x", "oci://***@b/x"),
    ("s3://a/{https://secret@h/x}", "s3://***@h/x}"), ("http://[::1]:80/a::b.tar", "http://[::1]:80/a::b.tar"),
    ("https://h/a?sig=sec::ret::/b.tar", "https://h/a?***::/b.tar"), ("pipe:curl sec::ret", "pipe:***"),
])
def test_what_is_shown(url, expected):
    assert shown(url) == expected
    assert shown(expected) == expected


def test_whatever_is_shown_twice_is_the_same_and_without_secrets():
    """Random texts of all that means something: never an error, and nothing between user and host, or after a ?."""
    chance = random.Random(0)
    words = ["s3://", "https://", "file:", "pipe:", "::", "@", "user:", "/", "?", "#", "{", "}", ",", "..", "*", "host",
             ".tar", "\\", "\n", "é", "[", "|", "0.5*", HIDDEN, "secret"]
    for _ in range(10_000):
        text = "".join(chance.choices(words, k=chance.randrange(12)))
        once = shown(text)
        assert shown(once) == once, text
    for _ in range(5_000):
        secret = "".join(chance.choices(string.ascii_letters + string.digits + "%.-_~!$&'()*+,;=:@", k=9)) + "XYZZY"
        path = "".join(chance.choices(["a", "/", "{0..3}", "::b", "@", "=", ".tar"], k=4))
        for url in (f"https://u:{secret}@h/{path}", f"https://h/{path}?k={secret}", f"https://h/{path}#{secret}",
                    f"s3://b/x::https://{secret}@h/{path}::/local"):
            assert "XYZZY" not in shown(url), url


def test_long_texts_take_no_time():
    began = time.monotonic()
    for text in ("https://u:" + "a" * 100_000, "a://" * 3_000, "a" * 100_000 + "://", "::" * 50_000, "a://?" * 9_000):
        shown(text)
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("spec, expected", [
    ("/data/train", ["/data/train"]),
    ("s3://b/a-{08..11}.tar", ["s3://b/a-08.tar", "s3://b/a-09.tar", "s3://b/a-10.tar", "s3://b/a-11.tar"]),
    ("http://{a,b}/x{0..1}.tar", ["http://a/x0.tar", "http://a/x1.tar", "http://b/x0.tar", "http://b/x1.tar"]),
    ("http://[::1]:80/{0..1}.tar::./a::/b::c", ["http://[::1]:80/0.tar", "http://[::1]:80/1.tar", "./a", "/b", "c"]),
    ("S3://Bucket/{a,b}::HTTPS://Host/x", ["s3://Bucket/a", "s3://Bucket/b", "https://Host/x"]),
    ("https://u:p::q@h/x?y=1::2", ["https://u:p::q@h/x?y=1::2"]), ("//a/b", ["//a/b"]), ("./a:/b", ["./a:/b"]),
    ("s3://b/x.tar::/y{1..2}.tar::gs://c/z", ["s3://b/x.tar", "/y1.tar", "/y2.tar", "gs://c/z"]),
    ("shards/*.tar", ["shards/*.tar"]), ("shards/[ab]?.tar", ["shards/[ab]?.tar"]), ("0*.tar", ["0*.tar"]),
    ("file:///data/a%20b{0..1}.tar", ["/data/a b0.tar", "/data/a b1.tar"]),
    ("file://localhost/a", ["/a"]), ("file:/a", ["/a"]), ("FILE:a/b", ["a/b"]),
    ("hf://datasets/a/b@1.0/c.tar", ["hf://datasets/a/b@1.0/c.tar"]), ("imagenet@2", ["imagenet@2"]),
    ("https://u:p@h/a.tar?x=1&y=2", ["https://u:p@h/a.tar?x=1&y=2"]),
    ("{3..1}.tar", ["3.tar", "2.tar", "1.tar"]),
])
def test_what_a_spec_names(spec, expected):
    assert expand(spec, 100) == expected


@pytest.mark.parametrize("spec, message", [
    ("", "'' has an empty part; give paths or URLs"), ("a.tar::", "has an empty part"), ("::a", "has an empty part"),
    ("pipe:curl secret", r"'pipe:\*\*\*' asks to run a command, which is refused; give the URL itself"),
    ("a.tar::pipe: cat x", "asks to run a command"),
    ("exec:x", "asks to run a command"), ("shell:x", "to run a command"),
    ("|cat a", "asks to run a command"), ("cat a |", "asks to run a command"),
    ("s3://b/{0..3}.tar|1000", "has a number of samples after '|', as timm takes it; leave it out"),
    ("s3://b/{0..3}.tar@0.5", "has a weight; weights are not supported: every image comes once in an epoch"),
    ("s3://b/*@2", "weights are not supported"), ("0.5*s3://b/a.tar", "weights are not supported"),
    ("2 * s3://b/a.tar", "weights are not supported"), (".5*/a/b.tar::c.tar", "weights are not supported"),
    ("simplecache::s3://b/a.tar", "names simplecache, a cache of fsspec.*--data.cache"),
    ("s3://b/a{0..3.tar", r"'s3://b/a\{0..3.tar' has braces that do not match; close each"),
    ("s3://b/{0..100}.tar", "'s3://b/{0..100}.tar' names more than 100 files; name fewer"),
    ("s3://b/{0..999999999999999999}.tar", "names more than 100 files"),
    ("{-9999999999..9}", "names more than 100 files"),
    ("{0..50}::{0..50}", "'{0..50}::{0..50}' names more than 100 files"), ("{0..9}{0..9}{0..9}", "more than 100 files"),
    ("file://other/a.tar", "'file://other/a.tar' is no file of this computer; write file:///path"),
    ("file:", "is no file of this computer"), ("file:///a%00b", "is no file of this computer"),
    ("http://[abc/x.tar", "no URL; write https://HOST/PATH, and .* as %5B and %5D"), ("s3://b[1/x.tar", "is no URL"),
    ("http://h\u2100st/x.tar", "is no URL"), ("file://[a/b", "is no URL"), ("{s3://b[1/x,a}", "is no URL"),
    ("https:/h/x.tar", "'https:/h/x.tar' has one / after its scheme; write https:// for a server, or ./ before"),
    ("s3://", "'s3://' names no host and no bucket; write s3://, the host or bucket, and the path"),
    ("S3:///", "names no host"), ("https://h/a\nHost: x", r"has characters that cannot be printed; write them as %XX"),
])
def test_what_is_refused(spec, message):
    with pytest.raises(SettingsError, match=message.replace("{", r"\{").replace(r"\\{", r"\{").replace("|", r"\|")):
        expand(spec, 100)


def test_no_refusal_shows_a_secret():
    for spec in ("https://u:secret@h/a?secret|100", "https://u:secret@h/a?secret::", "0.5*https://u:secret@h/?secret",
                 "https://u:secret@h/{0..999}?secret", "https://u:secret@h/{0?secret", "pipe:secret", "exec:x secret |",
                 "file://u:secret@h/?secret",
                 "https:/u:secret@h/x", "https://u:secret@[a/x"):
        with pytest.raises(SettingsError) as caught:
            expand(spec, 100)
        assert "secret" not in str(caught.value), spec


def test_exactly_the_limit():
    assert len(expand("{1..100}", 100)) == 100
    with pytest.raises(SettingsError):
        expand("{1..101}", 100)


@pytest.mark.parametrize("one, other, same", [
    ("https://a:b@h/x.tar?v=1&X-Amz-Signature=2#c", "https://h/x.tar?v=1", True),
    ("https://h/x.tar?v=1", "https://h/x.tar?v=2", False), ("sftp://a:b@h/x.tar", "sftp://c@h/x.tar", True),
    ("s3://key:secret@b/x.tar", "s3://b/x.tar", True), ("s3://b/x#1.tar", "s3://b/x#2.tar", False),
    ("s3://b/a@1/x.tar", "s3://b/a@2/x.tar", False), ("gs://b/x.tar?1", "gs://b/x.tar?2", False),
    ("abfs://train@acct/x/a.tar", "abfs://val@acct/x/a.tar", False), ("oci://a@n/x", "oci://b@n/x", False),
    ("hf://repo@v1/x.tar", "hf://repo@v2/x.tar", False)])
def test_the_place_is_that_of_the_object(one, other, same):
    assert (place(one) == place(other)) == same


def test_parts_of_a_long_text_take_no_time():
    began = time.monotonic()
    for text in ("https://u:" + "::a" * 5_000, "a" * 100_000 + "::b", "a::" * 30_000, "[" * 50_000 + "::]"):
        assert "::".join(parts(text)) == text
    assert time.monotonic() - began < 3
