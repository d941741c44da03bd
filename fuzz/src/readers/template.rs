//! Chat templates: sources grown from a grammar or changed, rendered with conversations.

use anyhow::Result;
use enamel_data::{ChatTemplate, Message, RenderOptions};
use serde_json::{Value, json};

use super::Reader;
use crate::folder::{Folder, Input, Part};
use crate::mutate;
use crate::random::Random;

const SEEDS: [&str; 6] = [
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "{%- if messages[0]['role'] == 'system' -%}{%- set system = messages[0]['content'] | trim -%}{%- set loop_messages = messages[1:] -%}{%- else -%}{%- set loop_messages = messages -%}{%- endif -%}{{ bos_token }}{%- for message in loop_messages -%}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}{{ message.content.strip() }}{{ eos_token if loop.last else '' }}{%- endfor -%}",
    "{% macro turn(m, first=false) %}<{{ m.role }}>{{ m.content }}{% endmacro %}{% set ns = namespace(n=0, tools=[]) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ turn(m, first=loop.first) }}{{ ns.n }}{% endfor %}",
    "{% if tools is defined and tools %}{% for t in tools %}{{ t | tojson(indent=2) }}{% endfor %}{% endif %}{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% elif m.tool_calls is iterable %}{% for c in m.tool_calls %}{{ c.function.arguments | items | list }}{% endfor %}{% endif %}{% endfor %}",
    "{{ strftime_now('%d %b %Y') }}{% for m in messages if m.content is string %}{{ '%s: %-10.3s|' | format(m.role, m.content) }}{{ m.content.split('a', 1)[0].replace('b', 'c').upper() }}{% if loop.length > 1 and not loop.last %}{% continue %}{% endif %}{{ loop.cycle('x', 'y') }}{% endfor %}",
    "{% filter upper %}{% for k, v in messages[0].items() %}{{ k ~ '=' ~ v | string | indent(4) }}{% endfor %}{% endfilter %}{% call(x) mac() %}{{ x }}{% endcall %}",
];

const WORDS: [&str; 140] = [
    "{%",
    "%}",
    "{{",
    "}}",
    "{#",
    "#}",
    "{%-",
    "-%}",
    "{{-",
    "-}}",
    "{%+",
    "+%}",
    "{% generation %}",
    "{% endgeneration %}",
    "{% if ",
    "{% elif ",
    "{% else %}",
    "{% endif %}",
    "{% for m in messages %}",
    "{% for ",
    " in ",
    "{% endfor %}",
    "{% set ",
    "{% set x %}",
    "{% endset %}",
    "{% macro f(a, b=1) %}",
    "{% endmacro %}",
    "{% call f() %}",
    "{% endcall %}",
    "{% filter upper %}",
    "{% endfilter %}",
    "{% raw %}",
    "{% endraw %}",
    "{% break %}",
    "{% continue %}",
    "{% with a=1 %}",
    "{% endwith %}",
    "{% block b %}",
    "{% endblock %}",
    "{% include 'x' %}",
    "{% extends 'x' %}",
    "{% import 'x' as y %}",
    "{% autoescape true %}",
    "{% do ns.a.append(1) %}",
    "messages",
    "message",
    "m.role",
    "m.content",
    "m['content']",
    "messages[-1]",
    "[::-1]",
    "[1:]",
    "[:0]",
    "[9223372036854775807]",
    "loop.index",
    "loop.last",
    "loop.previtem",
    "loop.nextitem",
    "loop.changed(m)",
    "loop.cycle(1)",
    "loop(m)",
    " recursive",
    "namespace(a=1)",
    "ns.a",
    "range(3)",
    "range(1000000000)",
    "range(0, -5, -1)",
    "dict(a=1)",
    "cycler(1,2)",
    "joiner(',')",
    "lipsum()",
    "raise_exception('x')",
    "strftime_now('%Y')",
    "strftime_now('%')",
    "strftime_now('%-')",
    "| tojson",
    "| tojson(indent=4)",
    "| tojson(indent=1000000000000)",
    "| tojson(ensure_ascii=false)",
    "| trim",
    "| trim('x')",
    "| length",
    "| join(',')",
    "| map(attribute='role')",
    "| selectattr('role', 'equalto', 'user')",
    "| list",
    "| first",
    "| last",
    "| reverse",
    "| sort",
    "| unique",
    "| batch(2)",
    "| slice(3)",
    "| items",
    "| dictsort",
    "| indent(4)",
    "| indent(1000000000)",
    "| replace('a', 'bb')",
    "| format(1)",
    "| string",
    "| int",
    "| float",
    "| round(2)",
    "| abs",
    "| default('')",
    "| safe",
    "| upper",
    "| title",
    "| urlencode",
    "| groupby('role')",
    "| sum",
    "| min",
    "| tojson | safe",
    "'%d' % 3",
    "'%99999999d' % 1",
    "'a' * 1000000",
    "'a' * 99999999999",
    "2 ** 9999",
    "1 // 0",
    "1 % 0",
    "1 / 0",
    "-9223372036854775808 // -1",
    "9223372036854775807 + 1",
    ".split()",
    ".strip('x')",
    ".startswith('a')",
    ".items()",
    ".get('x', 1)",
    ".format(1)",
    ".splitlines()",
    ".join(messages)",
    ".count('')",
    " is defined",
    " is not none",
    " is iterable",
    " is mapping",
    " if ",
    " else ",
    " not ",
    " and ",
];

/// What stands in expressions.
const ATOMS: [&str; 30] = [
    "messages",
    "m",
    "m.role",
    "m.content",
    "loop.index0",
    "loop",
    "ns",
    "x",
    "none",
    "true",
    "undefined_name",
    "tools",
    "bos_token",
    "add_generation_prompt",
    "''",
    "'ab c'",
    "'é\\n'",
    "'%s %d'",
    "0",
    "1",
    "-1",
    "3.5",
    "1e300",
    "9223372036854775807",
    "[]",
    "[1, 'a']",
    "{}",
    "{'a': 1}",
    "range(3)",
    "namespace(a=1)",
];

const FILTERS: [&str; 34] = [
    "tojson",
    "trim",
    "length",
    "list",
    "first",
    "last",
    "join(', ')",
    "upper",
    "lower",
    "title",
    "capitalize",
    "string",
    "int",
    "float",
    "round",
    "abs",
    "reverse",
    "sort",
    "unique",
    "items",
    "dictsort",
    "indent(2)",
    "default('d')",
    "replace('a', 'b')",
    "map(attribute='role')",
    "selectattr('role')",
    "select('string')",
    "batch(2)",
    "slice(2)",
    "format('a', 1)",
    "tojson(indent=1)",
    "sum",
    "min",
    "map('upper')",
];

const METHODS: [&str; 22] = [
    "split('a')",
    "rsplit(None, 1)",
    "strip()",
    "lstrip('a')",
    "startswith('a')",
    "endswith(('a', 'b'))",
    "replace('a', 'b', 1)",
    "upper()",
    "title()",
    "format(1, a=2)",
    "items()",
    "keys()",
    "get('a')",
    "splitlines(true)",
    "join(['a'])",
    "find('b')",
    "count('')",
    "rstrip('\\n')",
    "partition(' ')",
    "isdigit()",
    "zfill(5)",
    "removeprefix('a')",
];

const OPERATORS: [&str; 18] = [
    "+", "-", "*", "/", "//", "%", "**", "~", "==", "!=", "<", ">=", "and", "or", "in", "not in",
    "is", "|",
];

struct Templates {
    conversations: Vec<Value>,
}

pub fn make(_: &mut Folder) -> Result<Box<dyn Reader>> {
    let conversations = vec![
        json!([{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]),
        json!([{"role": "system", "content": "s"}, {"role": "user", "content": " ab c\n"},
            {"role": "assistant", "content": "x", "tool_calls": [{"type": "function",
                "function": {"name": "f", "arguments": {"a": [1, 2.5, null]}}}]},
            {"role": "tool", "content": "1", "name": "f"}, {"role": "assistant", "content": "é🧑"}]),
        json!([{"role": "user", "content": [{"type": "text", "text": "part"}]}]),
        json!([]),
    ];
    Ok(Box::new(Templates { conversations }))
}

/// An expression of at most `depth`.
fn expression(random: &mut Random, depth: usize, out: &mut String) {
    if depth == 0 || random.once_in(3) {
        out.push_str(random.word(&ATOMS));
        return;
    }
    let depth = depth - 1;
    match random.below(9) {
        0 => {
            expression(random, depth, out);
            out.push_str(" | ");
            out.push_str(random.word(&FILTERS));
        }
        1 => {
            expression(random, depth, out);
            out.push('.');
            out.push_str(random.word(&METHODS));
        }
        2 | 3 => {
            expression(random, depth, out);
            out.push(' ');
            out.push_str(random.word(&OPERATORS));
            out.push(' ');
            expression(random, depth, out);
        }
        4 => {
            expression(random, depth, out);
            out.push('[');
            expression(random, depth, out);
            if random.once_in(3) {
                out.push(':');
                expression(random, depth, out);
            }
            out.push(']');
        }
        5 => {
            expression(random, depth, out);
            out.push_str(" if ");
            expression(random, depth, out);
            out.push_str(" else ");
            expression(random, depth, out);
        }
        6 => {
            out.push_str(random.word(&["not ", "-", "("]));
            let open = out.ends_with('(');
            expression(random, depth, out);
            if open {
                out.push(')');
            }
        }
        7 => {
            expression(random, depth, out);
            let tests = [
                "defined",
                "none",
                "string",
                "iterable",
                "mapping",
                "number",
                "sequence",
                "true",
                "odd",
                "divisibleby(0)",
            ];
            out.push_str(random.word(&[" is ", " is not "]));
            out.push_str(random.word(&tests));
        }
        _ => {
            out.push_str(random.word(&[
                "dict(a=",
                "namespace(a=",
                "raise_exception(",
                "strftime_now(",
                "range(",
                "turn(",
            ]));
            expression(random, depth, out);
            out.push(')');
        }
    }
}

/// A few statements.
fn statements(random: &mut Random, depth: usize, out: &mut String) {
    for _ in 0..1 + random.below(3) {
        let mark = |random: &mut Random| *random.pick(&["", "", "", "-", "+"]);
        let (open, close) = (mark(random), if random.once_in(4) { "-" } else { "" });
        match random.below(if depth == 0 { 2 } else { 9 }) {
            0 => out.push_str(random.word(&[
                "text\n",
                "<|im_end|>",
                "  \n\t",
                "é",
                "{# c #}",
                "%}",
                "\r\n",
            ])),
            1 | 2 => {
                out.push_str(if random.once_in(6) { "{{-" } else { "{{" });
                out.push(' ');
                expression(random, 3, out);
                out.push_str(" }}");
            }
            3 | 4 => {
                out.push_str(&format!("{{%{open} for m in "));
                expression(random, 1, out);
                if random.once_in(5) {
                    out.push_str(" recursive");
                }
                out.push_str(&format!(" {close}%}}"));
                statements(random, depth - 1, out);
                if random.once_in(4) {
                    out.push_str("{% else %}e");
                }
                out.push_str(&format!("{{%{open} endfor {close}%}}"));
            }
            5 => {
                out.push_str(&format!("{{%{open} if "));
                expression(random, 2, out);
                out.push_str(&format!(" {close}%}}"));
                statements(random, depth - 1, out);
                out.push_str("{% endif %}");
            }
            6 => {
                out.push_str(&format!("{{%{open} set "));
                out.push_str(random.word(&["x", "ns", "ns.a", "x, y", "messages"]));
                out.push_str(" = ");
                expression(random, 3, out);
                out.push_str(&format!(" {close}%}}"));
            }
            7 => {
                out.push_str("{% macro turn(m, x=1) %}");
                statements(random, depth - 1, out);
                out.push_str("{% endmacro %}");
            }
            _ => {
                let (start, end) = *random.pick(&[
                    ("{% generation %}", "{% endgeneration %}"),
                    ("{% filter trim %}", "{% endfilter %}"),
                    ("{% set x %}", "{% endset %}"),
                    ("{% call turn(1) %}", "{% endcall %}"),
                    ("{% with x = m %}", "{% endwith %}"),
                    ("{% raw %}", "{% endraw %}"),
                ]);
                out.push_str(start);
                statements(random, depth - 1, out);
                out.push_str(end);
            }
        }
    }
}

impl Reader for Templates {
    fn input(&self, random: &mut Random) -> Input {
        let mut source = match random.below(3) {
            0 => {
                let mut text = String::new();
                statements(random, 3, &mut text);
                text.into_bytes()
            }
            _ => random.pick(&SEEDS).as_bytes().to_vec(),
        };
        let changes = random.below(4);
        for _ in 0..changes {
            mutate::text(random, &mut source, &WORDS);
        }
        if random.once_in(200) {
            // One piece very often: what nests, or goes on without end.
            let piece = random.pick(&WORDS).repeat(1 << random.below(13));
            let at = random.below(source.len() + 1);
            source.splice(at..at, piece.into_bytes());
        }
        let mut conversation = random.pick(&self.conversations).clone();
        if random.once_in(4) {
            mutate::json(
                random,
                &mut conversation,
                &["role", "content", "user", "assistant", "tool_calls"],
            );
        }
        Input(vec![
            Part::new("@chat_template.jinja", source),
            Part::new("@messages.json", conversation.to_string()),
        ])
    }

    fn read(&mut self, input: &Input, _: &mut Folder) -> Result<bool> {
        // A template that is not UTF-8 is none.
        let Ok(source) = std::str::from_utf8(input.part("@chat_template.jinja")) else {
            return Ok(false);
        };
        let special = [
            ("bos_token".to_owned(), "<s>".to_owned()),
            ("eos_token".to_owned(), "</s>".to_owned()),
        ];
        let template = match ChatTemplate::with_now(source, &special, 1_700_000_000) {
            Ok(template) => template,
            Err(error) => {
                let _ = error.to_string();
                return Ok(false);
            }
        };
        let messages: Value =
            serde_json::from_slice(input.part("@messages.json")).unwrap_or_default();
        let messages = messages.as_array().into_iter().flatten();
        let messages: Vec<Message> = messages
            .filter_map(|m| Some(Message::from_fields(m.as_object()?.clone())))
            .collect();
        let tools = json!([{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]);
        let options = RenderOptions {
            add_generation_prompt: true,
            tools: Some(&tools),
            ..RenderOptions::default()
        };
        if let Err(error) = template.render_with(&messages, options) {
            let _ = error.to_string();
            return Ok(false);
        }
        let (text, spans) = match template.render_generation(&messages, RenderOptions::default()) {
            Ok(done) => done,
            Err(_) => return Ok(true),
        };
        assert!(spans.into_iter().all(|span| text.get(span).is_some()));
        Ok(true)
    }
}
