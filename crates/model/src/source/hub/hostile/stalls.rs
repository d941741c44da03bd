//! Hubs that stand still, break off, or want time.

use super::bodies::GZIP_NOTHING;
use super::server::*;
use super::*;

#[test]
fn a_hub_that_stands_still_breaks_off_or_wants_time_is_given_up() {
    let nothing = &["config.json of org/tiny", "nothing arrived"][..];
    let silent = &["org/tiny", "no answer within"][..];
    let chunked = || {
        format!(
            "HTTP/1.1 200 OK\r\n{}Transfer-Encoding: chunked",
            tags(CONFIG.as_bytes())
        )
    };
    all_refused(vec![
        file(
            "drip",
            "config.json",
            &["config.json of org/tiny", "fewer than"],
            |_, stream| {
                send(
                    stream,
                    &format!(
                        "HTTP/1.1 200 OK\r\n{}Content-Length: 9999",
                        tags(CONFIG.as_bytes())
                    ),
                    b"",
                )?;
                forever(stream, b"x", 60)
            },
        ),
        file("still", "config.json", nothing, |_, stream| {
            send(
                stream,
                &format!(
                    "HTTP/1.1 200 OK\r\n{}Content-Length: 23",
                    tags(CONFIG.as_bytes())
                ),
                b"{",
            )?;
            std::thread::sleep(Duration::from_secs(30));
            Ok(true)
        }),
        file("chunk head", "config.json", nothing, move |_, stream| {
            send(stream, &chunked(), b"")?;
            forever(stream, b"0", 60)
        }),
        file("trailers", "config.json", nothing, move |_, stream| {
            let chunked = format!(
                "HTTP/1.1 200 OK\r\n{}Transfer-Encoding: chunked",
                tags(CONFIG.as_bytes())
            );
            send(
                stream,
                &chunked,
                format!("17\r\n{CONFIG}\r\n0\r\n").as_bytes(),
            )?;
            forever(stream, b"X-A: b\r\n", 60)
        }),
        file(
            "compressed nothings",
            "config.json",
            nothing,
            |_, stream| {
                let head = format!(
                    "HTTP/1.1 200 OK\r\n{}Content-Encoding: gzip",
                    tags(CONFIG.as_bytes())
                );
                send(stream, &head, b"")?;
                forever(stream, &GZIP_NOTHING.repeat(50), 1)
            },
        ),
        file(
            "headers drip",
            "config.json",
            &["config.json of org/tiny", "no answer within"],
            |_, stream| {
                stream.write_all(b"HTTP/1.1 200 OK\r\n")?;
                forever(stream, b"X-A: b\r\n", 60)
            },
        ),
        file(
            "headers without end",
            "config.json",
            &["config.json of org/tiny"],
            |_, stream| {
                stream.write_all(b"HTTP/1.1 200 OK\r\nX-A: ")?;
                forever(stream, &[b'a'; 1 << 16], 0)
            },
        ),
        file(
            "early hints",
            "config.json",
            &["config.json of org/tiny"],
            |_, stream| forever(stream, b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n", 20),
        ),
        file(
            "reset",
            "config.json",
            &["config.json of org/tiny"],
            |_, _| Ok(true),
        ),
        file(
            "no HTTP",
            "config.json",
            &["config.json of org/tiny"],
            |_, stream| {
                stream.write_all(b"SSH-2.0-OpenSSH_9.9\r\n\r\n")?;
                Ok(true)
            },
        ),
        file(
            "odd status",
            "config.json",
            &["config.json"],
            |_, stream| send(stream, "HTTP/1.1 99999 Yes\r\nContent-Length: 0", b""),
        ),
        file(
            "500",
            "config.json",
            &["config.json of org/tiny", "500"],
            |_, stream| {
                send(
                    stream,
                    "HTTP/1.1 500 No\r\nRetry-After: 999999999\r\nContent-Length: 0",
                    b"",
                )
            },
        ),
        file(
            "429",
            "config.json",
            &["config.json of org/tiny", "rate"],
            |_, stream| {
                send(
                    stream,
                    "HTTP/1.1 429 No\r\nRetry-After: -1\r\nContent-Length: 0",
                    b"",
                )
            },
        ),
        file(
            "304",
            "config.json",
            &["config.json", "304"],
            |_, stream| send(stream, "HTTP/1.1 304 No\r\nContent-Length: 0", b""),
        ),
        file(
            "gone",
            "config.json",
            &["config.json", "no such"],
            |_, stream| send(stream, "HTTP/1.1 404 No\r\nContent-Length: 0", b""),
        ),
        file(
            "a part unasked",
            "config.json",
            &["config.json", "Content-Range"],
            |_, stream| {
                let head = format!(
                    "HTTP/1.1 206 X\r\n{}Content-Length: 23",
                    tags(CONFIG.as_bytes())
                );
                send(stream, &head, CONFIG.as_bytes())
            },
        ),
        (
            "list: still",
            silent,
            Box::new(|_, stream| {
                // Nothing is sent; the client is listened to.
                let _ = stream.read(&mut [0; 1]);
                Ok(true)
            }),
        ),
        ("list: reset", &["org/tiny"], Box::new(|_, _| Ok(true))),
        (
            "list: 429",
            &["rate", "999999"],
            Box::new(|_, stream| {
                send(
                    stream,
                    "HTTP/1.1 429 No\r\nRetry-After: 999999\r\nContent-Length: 0",
                    b"",
                )
            }),
        ),
        (
            "list: 502",
            &["502"],
            Box::new(|_, stream| send(stream, "HTTP/1.1 502 No\r\nContent-Length: 5", b"<br/>")),
        ),
        (
            "list: drip",
            &["org/tiny", "fewer than"],
            Box::new(|_, stream| {
                send(stream, "HTTP/1.1 200 OK\r\nContent-Length: 9999", b"")?;
                forever(stream, b" ", 60)
            }),
        ),
    ]);
}
