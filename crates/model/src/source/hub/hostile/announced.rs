//! Answers whose head, list or index says what cannot be.

use serde_json::json;

use super::super::INDEX;
use super::bodies::gzip_bomb;
use super::server::*;
use super::*;

/// A case whose hub answers config.json with these headers.
pub fn config(
    case: &'static str,
    wanted: &'static [&'static str],
    headers: impl Into<String>,
) -> Case {
    let headers = headers.into();
    file(case, "config.json", wanted, move |_, stream| {
        ok(stream, &headers, CONFIG.as_bytes())
    })
}

/// A case whose hub redirects config.json to this address.
fn redirect(case: &'static str, wanted: &'static [&'static str], location: &'static str) -> Case {
    file(case, "config.json", wanted, move |_, stream| {
        let head = format!(
            "HTTP/1.1 302 Found\r\n{}{location}Content-Length: 0",
            tags(CONFIG.as_bytes())
        );
        send(stream, &head, b"")
    })
}

/// A case whose hub answers the question for its files with this body.
fn listed(case: &'static str, wanted: &'static [&'static str], body: impl Into<Vec<u8>>) -> Case {
    let body = body.into();
    let trick = move |asked: &Asked, stream: &mut TcpStream| match asked.is_list() {
        true => ok(stream, "", &body),
        false => Ok(false),
    };
    (case, wanted, Box::new(trick))
}

#[test]
fn tags_and_commits_that_are_none_are_refused() {
    let commit = format!("X-Repo-Commit: {COMMIT}\r\n");
    let etag = format!("ETag: \"{}\"\r\n", git_id(CONFIG.as_bytes()));
    let no_hash = &["config.json", "ETag is not a hash"][..];
    let of_another = &["config.json", "another commit"][..];
    all_refused(vec![
        config(
            "up",
            no_hash,
            format!("ETag: \"../../../../victim\"\r\n{commit}"),
        ),
        config(
            "absolute",
            no_hash,
            format!("ETag: \"/etc/passwd\"\r\n{commit}"),
        ),
        config(
            "long",
            no_hash,
            format!("ETag: \"{}\"\r\n{commit}", "a".repeat(5000)),
        ),
        config("empty", no_hash, format!("ETag: \"\"\r\n{commit}")),
        config(
            "38 digits",
            no_hash,
            format!("ETag: \"{}\"\r\n{commit}", "a".repeat(38)),
        ),
        config("no tag", &["config.json", "no hash of the file"], &*commit),
        config(
            "control",
            &["config.json", "not text"],
            format!("ETag: \"é\"\r\n{commit}"),
        ),
        config(
            "two tags",
            &["config.json", "two different etag"],
            format!("{etag}ETag: \"{}\"\r\n{commit}", "b".repeat(40)),
        ),
        config(
            "commit up",
            of_another,
            format!("{etag}X-Repo-Commit: ../../../../victim2\r\n"),
        ),
        config(
            "commit moved",
            of_another,
            format!("{etag}X-Repo-Commit: {}\r\n", "b".repeat(40)),
        ),
        config("no commit", &["config.json", "names no commit"], &*etag),
        config(
            "linked tag",
            &["config.json", "X-Linked-Etag is not a hash"],
            format!("{etag}{commit}X-Linked-Etag: \"../x\"\r\n"),
        ),
        config(
            "linked size",
            &["config.json", "no size"],
            format!(
                "{etag}{commit}X-Linked-Etag: {}\r\nX-Linked-Size: -1\r\n",
                "a".repeat(64)
            ),
        ),
        config(
            "wrong hash",
            &["config.json of org/tiny", "Git hash"],
            format!("ETag: \"{}\"\r\n{commit}", "c".repeat(40)),
        ),
        config(
            "wrong SHA-256",
            &["config.json of org/tiny", "SHA-256"],
            format!("ETag: \"{}\"\r\n{commit}", "c".repeat(64)),
        ),
    ]);
}

#[test]
fn redirects_that_lead_nowhere_are_refused() {
    let no_address = &["config.json", "no address"][..];
    let other = &["config.json", "neither http nor https"][..];
    all_refused(vec![
        redirect(
            "to itself",
            &["config.json", "more than 5 times"],
            "Location: \r\n",
        ),
        redirect(
            "query",
            &["config.json", "more than 5 times"],
            "Location: ?x=1&Signature=1\r\n",
        ),
        redirect("nowhere", &["config.json", "without saying where"], ""),
        redirect("broken", no_address, "Location: http://[::bad\r\n"),
        redirect(
            "backslash",
            no_address,
            "Location: http://127.0.0.1\\@evil/\r\n",
        ),
        redirect("host", no_address, "Location: //a b/?Signature=x\r\n"),
        redirect("file", other, "Location: file:///etc/passwd\r\n"),
        redirect("ftp", other, "Location: ftp://127.0.0.1/x\r\n"),
        redirect(
            "password",
            &["config.json", "password in it"],
            "Location: http://u:p@127.0.0.1/\r\n",
        ),
        redirect(
            "two places",
            &["two different location"],
            "Location: /a\r\nLocation: /b\r\n",
        ),
        redirect(
            "closed port",
            &[
                "config.json of org/tiny",
                "http://127.0.0.1:1/…, where the hub redirects to",
            ],
            "Location: http://127.0.0.1:1/x?Signature=abc\r\n",
        ),
        (
            "of the list",
            &["more than 5 times"],
            Box::new(|_, stream| {
                send(
                    stream,
                    "HTTP/1.1 307 X\r\nLocation: ?again\r\nContent-Length: 0",
                    b"",
                )
            }),
        ),
    ]);
}

#[test]
fn lists_that_are_none_are_refused() {
    let bomb = gzip_bomb();
    let name = |name: &str| {
        let mut list = full_list();
        list["siblings"][1]["rfilename"] = json!(name);
        list.to_string()
    };
    let part = |key: &str, value: serde_json::Value| {
        let mut list = full_list();
        list["siblings"][0][key] = value;
        list.to_string()
    };
    let out = &["leads out of the repository"][..];
    let none = &["not what a hub answers"][..];
    let deep = format!(
        "{{\"sha\":\"{COMMIT}\",\"siblings\":{}",
        "[".repeat(200_000)
    );
    let unknown = format!("{{\"x\":{}", "{\"a\":".repeat(200_000));
    all_refused(vec![
        listed("up", out, name("../../../../evil.json")),
        listed("up within", out, name("a/../../evil.json")),
        listed("absolute", out, name("/etc/passwd")),
        listed("backslash", out, name("..\\evil.json")),
        listed("drive", out, name("C:evil.json")),
        listed("nul", out, name("a\0b")),
        listed("empty", out, name("")),
        listed("twice", &["config.json twice"], name("config.json")),
        listed("commit", &["commit of its file list is not a hash"], {
            let mut list = full_list();
            list["sha"] = json!("../../../evil");
            list.to_string()
        }),
        listed("page", &["web page"], "<!doctype html><h1>Log in</h1>"),
        listed("nothing", none, ""),
        listed("binary", none, vec![0xff; 5000]),
        listed("another", none, "[1, 2]"),
        listed("null", none, "null"),
        listed("deep", none, deep),
        listed("deep elsewhere", none, unknown),
        listed("cut", none, &full_list().to_string()[..200]),
        listed(
            "size",
            &["size of config.json is impossible"],
            part("size", json!(-1)),
        ),
        listed(
            "huge size",
            &["size of config.json is impossible"],
            part("size", json!(1e300)),
        ),
        listed(
            "hash",
            &["hash of config.json"],
            part("blobId", json!("../../x")),
        ),
        listed(
            "other size",
            &["config.json", "as 23 and as 5 bytes"],
            part("size", json!(5)),
        ),
        listed(
            "other hash",
            &["config.json", "another than in the file list"],
            part("blobId", json!("d".repeat(40))),
        ),
        (
            "endless",
            &["file list exceeds"],
            Box::new(|asked, stream| {
                if !asked.is_list() {
                    return Ok(false);
                }
                send(stream, "HTTP/1.1 200 OK", b"{\"siblings\":[")?;
                forever(
                    stream,
                    &b"{\"rfilename\":\"aaaaaaaaaaaaaaaa\"},".repeat(9999),
                    0,
                )
            }),
        ),
        (
            "announced endless",
            &["file list exceeds"],
            Box::new(|_, stream| {
                send(stream, "HTTP/1.1 200 OK\r\nContent-Length: 9999999999", b"")
            }),
        ),
        (
            "compressed",
            &["file list exceeds"],
            Box::new(move |_, stream| ok(stream, "Content-Encoding: gzip\r\n", &bomb)),
        ),
    ]);
}

#[test]
fn indices_of_shards_that_are_none_are_refused() {
    let index = |text: String| -> Box<Trick> {
        Box::new(move |asked, stream| {
            if asked.is_list() {
                let names = ["config.json", INDEX, "a.safetensors", "A.safetensors"];
                let siblings: Vec<_> = names
                    .iter()
                    .map(|name| json!({"rfilename": name}))
                    .collect();
                let list = json!({"sha": COMMIT, "siblings": siblings});
                return ok(stream, "", list.to_string().as_bytes());
            }
            match asked.is(INDEX) {
                true => {
                    let etag = git_id(text.as_bytes());
                    let headers = format!("ETag: \"{etag}\"\r\nX-Repo-Commit: {COMMIT}\r\n");
                    ok(stream, &headers, text.as_bytes())
                }
                false => Ok(false),
            }
        })
    };
    let map = |names: &[&str]| {
        let map: serde_json::Map<_, _> = names
            .iter()
            .enumerate()
            .map(|(at, name)| (at.to_string(), json!(name)))
            .collect();
        json!({"weight_map": map}).to_string()
    };
    let none = &["model.safetensors.index.json is not a shard index"][..];
    all_refused(vec![
        ("up", none, index(map(&["../x.safetensors"]))),
        ("absolute", none, index(map(&["/tmp/x.safetensors"]))),
        ("backslash", none, index(map(&["..\\x.safetensors"]))),
        (
            "same but for case",
            none,
            index(map(&["a.safetensors", "A.safetensors"])),
        ),
        ("no weights", none, index(map(&["config.json"]))),
        ("empty", none, index(map(&[]))),
        ("deep", none, index("[".repeat(100_000))),
        (
            "not listed",
            &["names b.safetensors, which it lacks"],
            index(map(&["b.safetensors"])),
        ),
    ]);
}
