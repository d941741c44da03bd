//! What is believed of an answer, case by case.
#![allow(clippy::unwrap_used)]

use super::*;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

fn head(status: u16, fields: &[(&str, &str)]) -> Head {
    Head {
        status,
        fields: fields
            .iter()
            .map(|(name, value)| ((*name).to_owned(), value.as_bytes().to_vec()))
            .collect(),
    }
}

#[test]
fn a_tag_is_forty_or_sixty_four_digits() {
    let git = "A".repeat(40);
    let wanted = Some(BlobId::Git("a".repeat(40)));
    for text in [git.clone(), format!("\"{git}\""), format!("W/\"{git}\"")] {
        assert_eq!(BlobId::parse(&text), wanted);
    }
    assert!(matches!(
        BlobId::parse(&"0".repeat(64)),
        Some(BlobId::Sha256(_))
    ));
    let long = "a".repeat(65);
    let nul = format!("{}\0", "a".repeat(39));
    for text in [
        "",
        "\"\"",
        "..",
        &long,
        &nul,
        &"é".repeat(20),
        &format!("\"{git}"),
        "a-40",
    ] {
        assert_eq!(BlobId::parse(text), None, "{text:?}");
    }
    assert_eq!(commit(&git), Some("a".repeat(40)));
    assert_eq!(commit(&format!("\"{git}\"")), None);
}

/// The public hub's answers to a file of large file storage, to one of Git that it sends on within
/// itself, and to one that it answers at once.
#[test]
fn the_public_hubs_answers_are_understood() {
    let (sha, git) = ("5".repeat(64), "7".repeat(40));
    let large = head(
        302,
        &[
            ("x-repo-commit", COMMIT),
            ("x-linked-size", "269060552"),
            ("x-linked-etag", &format!("\"{sha}\"")),
            ("etag", "\"a1b2-of-the-redirect\""),
            ("location", "https://cas-bridge.example/x?Signature=1"),
        ],
    );
    let storage = head(
        200,
        &[("etag", "\"another\""), ("content-length", "269060552")],
    );
    let mut told = Announced::default();
    told.hop(&large, true, COMMIT).unwrap();
    told.hop(&storage, false, COMMIT).unwrap();
    assert_eq!(told.file(), Ok((BlobId::Sha256(sha), Some(269_060_552))));

    let within = head(
        307,
        &[
            ("x-repo-commit", COMMIT),
            ("x-linked-etag", &format!("\"{git}\"")),
            ("x-linked-size", "861"),
            ("location", "/api/resolve-cache/models/a/b/c/config.json"),
        ],
    );
    let quoted = format!("\"{git}\"");
    let small = head(200, &[("x-repo-commit", COMMIT), ("etag", &quoted)]);
    let mut told = Announced::default();
    told.hop(&within, true, COMMIT).unwrap();
    told.hop(&small, true, COMMIT).unwrap();
    assert_eq!(told.file(), Ok((BlobId::Git(git.clone()), Some(861))));

    let mut told = Announced::default();
    told.hop(&small, true, COMMIT).unwrap();
    assert_eq!(told.file(), Ok((BlobId::Git(git), None)));
}

#[test]
fn a_foreign_host_cannot_name_the_hash() {
    let tag = format!("\"{}\"", "7".repeat(40));
    let mut told = Announced::default();
    let own = head(302, &[("x-repo-commit", COMMIT)]);
    told.hop(&own, true, COMMIT).unwrap();
    told.hop(&head(200, &[("etag", &tag)]), false, COMMIT)
        .unwrap();
    assert!(told.file().unwrap_err().contains("no hash"));
}

#[test]
fn a_redirect_keeps_its_encryption() {
    let from = Url::parse("https://hub.example/a/b").unwrap();
    let to = |location: &str| {
        let to = redirect(&from, &head(302, &[("location", location)]));
        to.map(|url| url.to_string())
    };
    assert_eq!(to("c#x"), Ok("https://hub.example/a/c".into()));
    assert_eq!(to("//cdn.example/x"), Ok("https://cdn.example/x".into()));
    assert!(
        to("http://hub.example/a")
            .unwrap_err()
            .contains("https to http")
    );
    let long = format!("/{}", "a".repeat(ADDRESS_BYTES));
    assert!(to(&long).unwrap_err().contains("without end"));
}

#[test]
fn a_part_is_that_which_was_asked_for() {
    let part = |range: &str, length: &str| {
        let head = head(206, &[("content-range", range), ("content-length", length)]);
        carried(&head, 3)
    };
    let wanted = Carried {
        start: 3,
        total: Some(10),
    };
    assert_eq!(part("bytes 3-9/10", "7"), Ok(wanted));
    assert_eq!(part("bytes 3-9/*", "7"), Ok(wanted));
    let again = Carried { start: 0, ..wanted };
    assert_eq!(part("bytes 0-9/10", "10"), Ok(again));
    for (range, length) in [
        ("bytes 4-9/10", "6"),
        ("bytes 3-8/10", "6"),
        ("bytes 3-9/10", "8"),
        ("bytes 9-3/10", "7"),
        ("bytes 3-9/5", "7"),
        ("bytes=3-9/10", "7"),
        ("items 3-9/10", "7"),
        ("bytes 3-18446744073709551615/*", "7"),
        ("bytes +3-9/10", "7"),
        ("", "7"),
    ] {
        assert!(part(range, length).is_err(), "{range} {length}");
    }
}

#[test]
fn names_that_not_every_system_can_hold_are_left_out() {
    let names = [
        "a\\b",
        "a\nb",
        "a\u{202e}b",
        "CON",
        "com1.txt",
        "a.",
        "xx:y",
        "ok/config.json",
    ];
    let siblings: Vec<_> = names
        .iter()
        .map(|name| serde_json::json!({"rfilename": name}))
        .collect();
    let body = serde_json::json!({"sha": COMMIT, "siblings": siblings}).to_string();
    let listing = listing(body.as_bytes()).unwrap();
    let kept: Vec<&str> = listing.files.iter().map(|file| &*file.name).collect();
    assert_eq!(kept, ["ok/config.json"]);
}

#[test]
fn more_files_than_a_repository_may_have_are_refused() {
    let file = "{\"rfilename\":\"a\"}";
    let many = vec![file; LISTING_FILES + 2].join(",");
    let body = format!("{{\"sha\":\"{COMMIT}\",\"siblings\":[{many}]}}");
    assert!(listing(body.as_bytes()).unwrap_err().contains("100000"));
}
