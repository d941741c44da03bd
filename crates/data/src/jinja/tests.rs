//! Against Jinja2's own results, and against templates that want too much.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::time::{Duration, Instant};

use serde_json::{Value as Json, json};

use super::{Error, Kind, Template};

/// Written by `tests/fixtures/make_template_goldens.py`.
const GOLDENS: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../../tests/fixtures/data/template_goldens.json"
);

fn goldens() -> Json {
    serde_json::from_slice(&std::fs::read(GOLDENS).unwrap()).unwrap()
}

fn variables(context: &Json) -> Vec<(&str, &Json)> {
    let entries = context.as_object().unwrap().iter();
    entries
        .map(|(name, value)| (name.as_str(), value))
        .collect()
}

fn render(source: &str, context: &Json) -> Result<String, Error> {
    let template = Template::parse(source)?;
    Ok(template.render(&variables(context), 0)?.text)
}

#[test]
fn expressions_and_statements_give_what_jinja2_gives() {
    let goldens = goldens();
    let cases = goldens["cases"].as_array().unwrap();
    assert!(cases.len() > 1300, "the goldens shrank");
    let mut wrong = Vec::new();
    for case in cases {
        let (source, theirs) = (case[0].as_str().unwrap(), case[1].as_str());
        let ours = render(source, &goldens["context"]);
        if ours.as_deref().ok() != theirs {
            wrong.push(format!("{source}\n  ours   {ours:?}\n  theirs {theirs:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// A conversation of 100 kB.
fn conversation() -> Json {
    json!({"messages": [{"role": "user", "content": "x".repeat(100_000)}], "s": "abc"})
}

/// Renders on a stack of 1 MiB, a fraction of any thread's, and checks that it did not take long.
fn render_small(source: &str) -> Result<String, Error> {
    let source = source.to_owned();
    let thread = std::thread::Builder::new().stack_size(1 << 20);
    let work = move || {
        let start = Instant::now();
        let rendered = render(&source, &conversation());
        let took = start.elapsed();
        let head: String = source.chars().take(90).collect();
        assert!(took < Duration::from_secs(20), "{head} took {took:?}");
        rendered
    };
    thread.spawn(work).unwrap().join().unwrap()
}

#[track_caller]
fn over_budget(source: &str) {
    let head: String = source.chars().take(90).collect();
    match render_small(source) {
        Err(error) => {
            let kinds = [Kind::Budget, Kind::Depth, Kind::Overflow];
            assert!(kinds.contains(&error.kind()), "{head}: {error}");
            let has_limit = error.to_string().contains(|c: char| c.is_ascii_digit());
            assert!(has_limit, "{head}: {error}");
        }
        Ok(text) => panic!("{head} gave {} bytes", text.len()),
    }
}

#[test]
fn sources_that_nest_or_go_on_are_refused() {
    let chain = |link: &str, count: usize| link.repeat(count);
    for (open, close) in [
        ("(", ")"),
        ("[", "]"),
        ("{'a':", "}"),
        ("f(", ")"),
        ("l[", "]"),
    ] {
        let source = format!("{{{{ {}1{} }}}}", chain(open, 40_000), chain(close, 40_000));
        over_budget(&source);
    }
    for link in [
        ".b", "[0]", "()", "|upper", " + 1", " - 1", " and 1", " or 1", "**2", " if 1",
    ] {
        over_budget(&format!("{{{{ s{} }}}}", chain(link, 20_000)));
    }
    for prefix in ["-", "+", "not ", "1 if 1 else "] {
        over_budget(&format!("{{{{ {}1 }}}}", chain(prefix, 20_000)));
    }
    over_budget(&chain("{% if 1 %}", 20_000));
    over_budget(&chain("{% for x in s %}", 10_000));
    over_budget(&"x".repeat(300_000));
    // What is long and flat is fine.
    assert_eq!(
        render_small(&format!("{{{{ 1{} }}}}", " ~ 1".repeat(50_000)))
            .unwrap()
            .len(),
        50_001
    );
    let branches = "{% elif 0 %}b".repeat(10_000);
    assert_eq!(
        render_small(&format!(
            "{{% if 0 %}}a{branches}{{% else %}}c{{% endif %}}"
        ))
        .unwrap(),
        "c"
    );
}

#[test]
fn depth_that_jinja2_bears_is_borne_on_a_small_stack() {
    let nested = format!("{{{{ {}1{} }}}}", "(".repeat(60), ")".repeat(60));
    assert_eq!(render_small(&nested).unwrap(), "1");
    let blocks = format!("{}x{}", "{% if 1 %}".repeat(90), "{% endif %}".repeat(90));
    assert_eq!(render_small(&blocks).unwrap(), "x");
    let sum = format!("{{{{ 1{} }}}}", " + 1".repeat(150));
    assert_eq!(render_small(&sum).unwrap(), "151");
    let recursion = "{% macro f(n) %}{% if n %}{% for x in [n - 1] %}{{ f(x) }}{% endfor %}\
        {% else %}end{% endif %}{% endmacro %}{{ f(150) }}";
    assert_eq!(render_small(recursion).unwrap(), "end");
}

#[test]
fn widths_and_counts_are_asked_before_they_are_filled() {
    for expression in [
        "'a\nb'|indent(10**12)",
        "{'a': 1}|tojson(indent=10**12)",
        "'%999999999999d'|format(1)",
        "'%*d' % (10**12, 1)",
        "'%.999999999f' % 1.0",
        "'%.999999999d' % 1",
        "'{:999999999}'.format(1)",
        "'{:.999999999f}'.format(1.0)",
        "'x'.center(10**12)",
        "'x'.ljust(10**12)",
        "'x'.zfill(10**12)",
        "'x'|center(10**12)",
        "'\t'.expandtabs(10**12)",
        "'x' * 10**12",
        "[1] * 10**12",
        "range(10**12)",
        "[1]|slice(10**9)|list",
        "[1]|batch(10**9, 0)|list",
        "10**10**10",
        "2**100000",
        "10.0**400",
        "(messages|tojson) * 10000",
        "messages * 100000000",
    ] {
        over_budget(&format!("{{{{ {expression} }}}}"));
    }
}

#[test]
fn time_and_memory_end() {
    let grow = |how: &str| {
        format!(
            "{{% set n = namespace(a=s, l=[1], t=(1,)) %}}{{% for i in range(100000) %}}{how}{{% endfor %}}"
        )
    };
    for how in [
        "{% set n.a = n.a ~ n.a %}",
        "{% set n.a = n.a + n.a %}",
        "{% set n.a = n.a|replace('a', n.a) %}",
        "{% set n.a = n.a.join([n.a, n.a]) %}",
        "{% set n.a %}{{ n.a }}{{ n.a }}{% endset %}",
        "{% set n.l = n.l + n.l %}",
        "{% set n.l = [n.l] %}",
        "{% set n.l = {'a': n.l} %}",
        "{% set n.t = (n.t, n.t) %}{% set n.a = {n.t: 1} %}",
        "{% set n.l = cycler(n.l) %}",
        "{% set n.l = joiner(n.l) %}",
        "{% for j in range(100000) %}{% endfor %}",
        "{{ messages[0].content }}",
        "{% set x = messages[0].content|title %}",
        "{% set x = messages[0].content.title() %}",
        "{% set x = messages[0].content.count('x') %}",
        "{% set x = messages[0].content.strip('yx') %}",
        "{% set x = messages[0].content|int %}",
        "{% set x = messages[0][messages[0].content] %}",
        "{% set x = range(100000)|max %}",
        "{% set x = 99999 in range(100000) %}",
    ] {
        over_budget(&grow(how));
    }
    over_budget("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}");
    over_budget(
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    );
    over_budget("{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}");
}

#[test]
fn cycles_and_long_chains_are_freed() {
    let looped = |body: &str| {
        format!(
            "{{% set n = namespace() %}}{{% for i in range(100000) %}}{body}{{% endfor %}}{{{{ 1 }}}}"
        )
    };
    for body in [
        "{% set x = namespace(p=n.a) %}{% set n.a = x %}",
        "{% macro f() %}{{ p }}{% endmacro %}{% set p = n.a %}{% set n.a = f %}",
        "{% set p = n.l %}{% for x in [1] recursive %}{% set n.l = loop %}{% endfor %}",
    ] {
        assert_eq!(render_small(&looped(body)).unwrap(), "1");
    }
    let cycle = "{% set n = namespace() %}{% set n.a = n %}{{ n }}";
    assert!(render_small(cycle).unwrap().contains("{...}"));
}

#[test]
fn the_budget_grows_with_the_conversation() {
    // Every template may go through what it is given, many times over.
    let source = "{% for m in messages %}{{ m.role }}{{ m.content|trim|upper|replace('A', 'b') }}\
        {{ m|tojson }}{% endfor %}";
    let message = json!({"role": "user", "content": "word ".repeat(20)});
    let context = json!({"messages": vec![message; 20_000]});
    assert!(render(source, &context).unwrap().len() > 4_000_000);
}

/// Sources made of the goldens' parts: whatever comes of them, it comes soon and is no panic.
#[test]
fn broken_templates_are_errors() {
    let goldens = goldens();
    let cases = goldens["cases"].as_array().unwrap();
    let sources: Vec<&str> = cases.iter().filter_map(|case| case[0].as_str()).collect();
    let context = &goldens["context"];
    let mut state = 0x9e37_79b9_u64;
    let mut random = move |below: usize| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below.max(1)
    };
    let (mut rendered, mut refused) = (0, 0);
    for _ in 0..20_000 {
        let mut source: Vec<char> = sources[random(sources.len())].chars().collect();
        for _ in 0..=random(3) {
            let other: Vec<char> = sources[random(sources.len())].chars().collect();
            let (from, at) = (random(other.len()), random(source.len() + 1));
            let part = &other[from..(from + random(12)).min(other.len())];
            let end = (at + random(6)).min(source.len());
            source.splice(at..end, part.iter().copied());
        }
        let source: String = source.into_iter().collect();
        let start = Instant::now();
        match render(&source, context) {
            Ok(_) => rendered += 1,
            Err(_) => refused += 1,
        }
        assert!(start.elapsed() < Duration::from_secs(20), "{source}");
    }
    assert!(rendered > 1000 && refused > 1000, "{rendered} {refused}");
}

#[test]
fn generation_blocks_are_where_their_text_is() {
    let spans = |source: &str| {
        let template = Template::parse(source).unwrap();
        let rendering = template.render(&[], 0).unwrap();
        let texts = rendering.spans.into_iter();
        texts
            .map(|span| rendering.text[span].to_owned())
            .collect::<Vec<_>>()
    };
    let block = "{% generation %}b{% endgeneration %}";
    assert_eq!(spans(&format!("a{block}c{block}")), ["b", "b"]);
    assert_eq!(
        spans("{% generation %}{% endgeneration %}{% generation %}x{% endgeneration %}"),
        ["", "x"]
    );
    assert_eq!(
        spans(&format!("{{% generation %}}[{block}]{{% endgeneration %}}")),
        ["[b]"]
    );
    // Through a macro or a variable the block's text is found again, unless it was changed.
    let set = format!("{{% set x %}}a{block}{{% endset %}}");
    assert_eq!(spans(&format!("{set}{{{{ x }}}}")), ["b"]);
    assert_eq!(spans(&format!("{set}{{{{ x|length }}}}")), [""; 0]);
}
