//! README.md of an adapter directory: Hugging Face's model card.

use std::fmt::Write;

use serde_json::{Value, json};

use crate::config::SaveMeta;
use crate::error::shown;
use crate::methods::AdapterConfig;
use crate::plan::AdapterPlan;

pub(crate) fn model_card(config: &AdapterConfig, plan: &AdapterPlan, meta: &SaveMeta) -> String {
    let mut card = String::from("---\n");
    let mut line = |text: String| {
        card.push_str(&text);
        card.push('\n');
    };
    let base = config.base_model_name_or_path();
    if let Some(base) = base {
        line(format!("base_model: {}", quoted(base)));
    }
    line("library_name: peft".into());
    let task = Use::of(config.task_type(), &meta.made.labels);
    if let Some(pipeline) = task.pipeline {
        line(format!("pipeline_tag: {pipeline}"));
    }
    let tag = config.peft_type().to_lowercase();
    line(format!("tags:\n- {tag}\n- enamel\n---\n"));
    let name = capitalised(config.label());
    line(format!(
        "# {name} adapter for {}\n",
        base.map_or("its base model".to_owned(), as_markdown_text)
    ));
    line(format!(
        "{} trained parameters{}, in {} adapted modules{}.\n",
        plan.trainable,
        match plan.total {
            // Written without the base at hand.
            0 => String::new(),
            total => format!(" ({:.4} % of {total})", plan.percent()),
        },
        plan.targets.len(),
        match plan.saved.len() {
            0 => String::new(),
            count => format!(" and {count} saved whole"),
        }
    ));
    if let Some(note) = config.card_note() {
        line(format!("{note}\n"));
    }
    let json_config = config.to_json();
    for key in config.card_settings() {
        let value = json_config.get(*key).unwrap_or(&serde_json::Value::Null);
        let empty = match value {
            Value::Null => true,
            Value::Object(map) => map.is_empty(),
            Value::Array(list) => list.is_empty(),
            _ => false,
        };
        if !empty {
            line(format!("- {key}: {}", as_markdown_text(&value.to_string())));
        }
    }
    line(String::new());
    line("## Use\n\nWith Enamel:\n".into());
    let reference = base.unwrap_or("BASE");
    line(format!(
        "```sh\nenamel {} --model {} --adapter THIS_DIRECTORY{}\n```\n",
        task.verb,
        for_shell(reference),
        task.rest
    ));
    line("With PEFT:\n".into());
    let revision = config
        .revision()
        .map_or(String::new(), |r| format!(", revision={}", quoted(r)));
    line(format!(
        "```python\nfrom transformers import {class}\nfrom peft import PeftModel\n\n\
         base = {class}.from_pretrained({}{revision}{})\n\
         model = PeftModel.from_pretrained(base, \"THIS_DIRECTORY\")\n```",
        quoted(reference),
        task.arguments,
        class = task.class,
    ));
    if let Some(extra) = &meta.extra_readme {
        let _ = write!(card, "\n{}\n", extra.trim_end());
    }
    card
}

/// How an adapter is used, which depends on what it is for.
struct Use {
    /// The Hub's name of the task.
    pipeline: Option<&'static str>,
    /// Enamel's verb, and what follows its options.
    verb: &'static str,
    rest: &'static str,
    /// transformers' class, and what it has to be told besides the base.
    class: &'static str,
    arguments: String,
}

impl Use {
    fn of(task_type: Option<&str>, labels: &[String]) -> Self {
        let generates = Self {
            pipeline: None,
            verb: "chat",
            rest: "",
            class: "AutoModelForCausalLM",
            arguments: String::new(),
        };
        match task_type {
            Some("CAUSAL_LM") => Self {
                pipeline: Some("text-generation"),
                ..generates
            },
            Some("SEQ_CLS") => Self {
                pipeline: Some("text-classification"),
                verb: "predict",
                rest: " ROWS.jsonl",
                class: "AutoModelForSequenceClassification",
                arguments: id2label(labels),
            },
            _ => generates,
        }
    }
}

/// The classes as an argument of `from_pretrained`; it makes as many outputs of them.
fn id2label(labels: &[String]) -> String {
    if labels.is_empty() {
        return String::new();
    }
    let named = labels.iter().enumerate();
    let named: Vec<String> = named
        .map(|(class, name)| format!("{class}: {}", quoted(name)))
        .collect();
    format!(", id2label={{{}}}", named.join(", "))
}

/// A name at the start of a heading.
fn capitalised(name: &str) -> String {
    let mut letters = name.chars();
    let first = letters.next().map(char::to_uppercase);
    first.into_iter().flatten().chain(letters).collect()
}

/// A string of YAML, of JSON and of Python, on one line whatever is in it.
fn quoted(text: &str) -> String {
    let json = json!(text).to_string();
    // What JSON leaves and YAML has no place for.
    let plain =
        |c: char| !c.is_control() && !('\u{2028}'..='\u{2029}').contains(&c) && c != '\u{feff}';
    json.chars().fold(String::new(), |mut all, c| {
        match plain(c) {
            true => all.push(c),
            false => drop(write!(all, "\\u{:04x}", u32::from(c))),
        }
        all
    })
}

/// Text that Markdown shows as it is, on one line and in one cell of a table: no tag, code, link or picture.
pub fn as_markdown_text(text: &str) -> String {
    shown(text)
        .replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('`', "&#96;")
        .replace('|', "&#124;")
        .replace("](", "]&#40;")
        .replace("][", "]&#91;")
}

/// One word of a shell's command, which does nothing in it.
fn for_shell(text: &str) -> String {
    let tame = |c: char| c.is_ascii_alphanumeric() || "/._-@:+".contains(c);
    if !text.is_empty() && !text.starts_with('-') && text.chars().all(tame) {
        return text.to_owned();
    }
    format!("'{}'", shown(text).replace('\'', "'\\''"))
}

#[cfg(test)]
#[allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::string_slice,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]
mod tests {
    use super::*;
    use crate::methods::lora::config::LoraConfig;

    fn card_of(base: &str) -> String {
        let config = LoraConfig {
            base_model_name_or_path: Some(base.into()),
            modules_to_save: Some(vec!["<img src=x>".into()]),
            ..LoraConfig::default()
        };
        model_card(
            &config.into(),
            &AdapterPlan::default(),
            &SaveMeta::default(),
        )
    }

    /// The heading, the YAML and the commands hold one line of the name and obey nothing in it.
    #[test]
    fn a_name_from_elsewhere_stays_text() {
        let card = card_of("a\nb: c\u{1b}[2J\u{7f}<script>\"'`$(touch x)![p](http://x)");
        assert!(
            card.starts_with(
                "---\nbase_model: \"a\\nb: c\\u001b[2J\\u007f<script>\\\"'`$(touch x)![p](http://x)\"\nlibrary_name"
            ),
            "{card}"
        );
        let heading = card
            .lines()
            .find(|line| line.starts_with("# LoRA"))
            .unwrap();
        assert_eq!(
            heading,
            "# LoRA adapter for a\\nb: c\\u{1b}[2J\\u{7f}&lt;script&gt;\"'&#96;$(touch x)![p]&#40;http://x)"
        );
        assert!(
            card.contains("- modules_to_save: [\"&lt;img src=x&gt;\"]"),
            "{card}"
        );
        assert!(
            card.contains(
                "--model 'a\\nb: c\\u{1b}[2J\\u{7f}<script>\"'\\''`$(touch x)![p](http://x)' --adapter"
            ),
            "{card}"
        );
        assert!(!card.chars().any(|c| c.is_control() && c != '\n'));
    }

    #[test]
    fn a_plain_name_is_not_quoted_for_the_shell() {
        assert!(card_of("org/name-1.0").contains("--model org/name-1.0 --adapter"));
        assert!(card_of("-x").contains("--model '-x' --adapter"));
    }
}
