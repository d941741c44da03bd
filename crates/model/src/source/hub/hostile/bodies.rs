//! Bodies that are not what was announced.

use super::announced::config;
use super::server::*;
use super::*;

/// 64 MB of spaces, compressed: made before a case begins, since it takes a while.
pub fn gzip_bomb() -> Vec<u8> {
    let mut writer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    for _ in 0..64 {
        writer.write_all(&[b' '; 1 << 20]).unwrap();
    }
    writer.finish().unwrap()
}

/// A compressed nothing; many of them are nothing too.
pub const GZIP_NOTHING: [u8; 20] = [
    0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0,
];

#[test]
fn bodies_that_are_not_what_was_announced_are_refused() {
    let bomb = gzip_bomb();
    let announced = bomb.clone();
    let weights_tags = || tags(&weights());
    let full = |trick: Box<Trick>| -> Box<Trick> {
        Box::new(move |asked, stream| match asked.is(WEIGHTS) {
            true => trick(asked, stream),
            false => Ok(false),
        })
    };
    all_refused(vec![
        (
            "endless",
            &[WEIGHTS, "more than the 300000 bytes"],
            full(Box::new(move |_, stream| {
                send(
                    stream,
                    &format!("HTTP/1.1 200 OK\r\n{}", weights_tags()),
                    b"",
                )?;
                forever(stream, &vec![0; 1 << 20], 0)
            })),
        ),
        (
            "endless chunks",
            &[WEIGHTS, "more than the 300000 bytes"],
            full(Box::new(move |_, stream| {
                let head = format!(
                    "HTTP/1.1 200 OK\r\n{}Transfer-Encoding: chunked",
                    weights_tags()
                );
                send(stream, &head, b"")?;
                forever(
                    stream,
                    format!("8000\r\n{}\r\n", "x".repeat(0x8000)).as_bytes(),
                    0,
                )
            })),
        ),
        (
            "longer by one",
            &[WEIGHTS, "300001"],
            full(Box::new(move |_, stream| {
                let mut bytes = weights();
                bytes.push(0);
                ok(stream, &weights_tags(), &bytes)
            })),
        ),
        (
            "other bytes",
            &["model.safetensors of org/tiny", "SHA-256"],
            full(Box::new(move |_, stream| {
                ok(stream, &weights_tags(), &vec![7; 300_000])
            })),
        ),
        file(
            "shorter each time",
            WEIGHTS,
            &["model.safetensors of org/tiny", "of 300000 bytes"],
            |asked, stream| {
                let (from, last) = (asked.range.unwrap_or(0), 299_999);
                let (status, range) = match asked.range {
                    None => ("200 OK", String::new()),
                    Some(_) => (
                        "206 Partial Content",
                        format!("Content-Range: bytes {from}-{last}/300000\r\n"),
                    ),
                };
                let head = format!(
                    "HTTP/1.1 {status}\r\n{}{range}Content-Length: {}",
                    tags(&weights()),
                    300_000 - from
                );
                send(stream, &head, &weights()[from as usize..][..1000])
            },
        ),
        file(
            "two sizes",
            WEIGHTS,
            &[WEIGHTS, "announced as"],
            |_, stream| {
                let headers = format!(
                    "{}X-Linked-Etag: \"{}\"\r\nX-Linked-Size: 7\r\n",
                    tags(&weights()),
                    sha256(&weights())
                );
                ok(stream, &headers, &weights())
            },
        ),
        file(
            "bomb",
            "config.json",
            &["config.json", "without having said how many"],
            move |_, stream| {
                let headers = format!("{}Content-Encoding: gzip\r\n", tags(CONFIG.as_bytes()));
                ok(stream, &headers, &bomb.repeat(2))
            },
        ),
        (
            "announced bomb",
            &["config.json", "more than the 23 bytes"],
            Box::new(move |asked, stream| match asked.is("config.json") {
                true => {
                    let headers = format!("{}Content-Encoding: gzip\r\n", tags(CONFIG.as_bytes()));
                    ok(stream, &headers, &announced)
                }
                false => Ok(false),
            }),
        ),
        config(
            "another coding",
            &["config.json", "compressed"],
            format!("{}Content-Encoding: br\r\n", tags(CONFIG.as_bytes())),
        ),
    ]);
}

#[test]
fn a_continuation_that_is_none_is_refused() {
    /// The first answer breaks off; what follows is the case's.
    fn then(
        case: &'static str,
        wanted: &'static [&'static str],
        next: impl Fn(u64) -> String + Send + Sync + 'static,
    ) -> Case {
        file(case, WEIGHTS, wanted, move |asked, stream| {
            let Some(from) = asked.range else {
                let head = format!(
                    "HTTP/1.1 200 OK\r\n{}Content-Length: 300000",
                    tags(&weights())
                );
                return send(stream, &head, &weights()[..200_000]);
            };
            let rest = &weights()[usize::try_from(from).unwrap()..];
            send(
                stream,
                &format!("HTTP/1.1 206 Partial Content\r\n{}", next(from)),
                rest,
            )
        })
    }
    let tagged = |rest: &str| format!("{}{rest}", tags(&weights()));
    let (a, b, c, d, e) = (tagged(""), tagged(""), tagged(""), tagged(""), tagged(""));
    all_refused(vec![
        then(
            "elsewhere",
            &[WEIGHTS, "from 5 on, where those from 200000 on"],
            move |_| format!("{a}Content-Range: bytes 5-299999/300000"),
        ),
        then("without range", &[WEIGHTS, "Content-Range"], move |_| {
            b.trim_end().to_owned()
        }),
        then("nonsense", &[WEIGHTS, "Content-Range"], move |_| {
            format!("{c}Content-Range: bytes 9-1/x")
        }),
        then(
            "other size",
            &[WEIGHTS, "less than the rest"],
            move |from| format!("{d}Content-Range: bytes {from}-299999/300001"),
        ),
        then("no number", &[WEIGHTS, "Content-Range"], move |from| {
            format!("{e}Content-Range: bytes {from}-99999999999999999999999/*")
        }),
        then(
            "other file",
            &[WEIGHTS, "another than a moment ago"],
            |from| {
                format!(
                    "{}Content-Range: bytes {from}-299999/300000",
                    tags(&vec![1; 2000])
                )
            },
        ),
    ]);
}
