//! What a model makes of its last hidden states: the next token's logits, or those of a text's classes.

use burn::module::Module;
use enamel_adapter::{Linear, Slot, SlotRef, Slots};
use serde_json::{Map, Value, json};

/// The language model's head. Where it is tied to the embedding, the model has no such module.
pub const HEAD: &str = "lm_head";

/// The classifier of transformers' `…ForSequenceClassification` on a decoder.
pub const CLASSIFIER: &str = "score";

/// Whether a module is a head, which is never quantised.
pub fn is_head(module: &str) -> bool {
    [HEAD, CLASSIFIER].contains(&module)
}

/// Which head a model has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum HeadConfig {
    /// Logits of the next token.
    #[default]
    CausalLm,
    /// Logits of a text's classes, from the hidden state of its last token.
    SequenceClassification {
        /// The classes' names in the order of their numbers.
        labels: Vec<String>,
        /// Whether the model's files have it. One that they do not have begins with normal values, as transformers
        /// initialises it.
        stored: bool,
    },
}

impl HeadConfig {
    /// Whether its weights begin with random values, whatever head the files have.
    pub fn is_new(&self) -> bool {
        matches!(self, Self::SequenceClassification { stored: false, .. })
    }

    /// Writes into a `config.json` what transformers has there for a model with this head: the class to load
    /// (`LlamaForSequenceClassification` where it was `LlamaForCausalLM`), and the classes.
    pub(crate) fn write(&self, json: &mut Map<String, Value>) {
        let Self::SequenceClassification { labels, .. } = self else {
            return;
        };
        if let Some(Value::Array(names)) = json.get_mut("architectures") {
            for name in names {
                if let Some(stem) = name.as_str().and_then(stem) {
                    *name = json!(format!("{stem}ForSequenceClassification"));
                }
            }
        }
        let named = labels.iter().enumerate();
        let by_number: Map<String, Value> = named
            .clone()
            .map(|(class, name)| (class.to_string(), json!(name)))
            .collect();
        let by_name: Map<String, Value> = named
            .map(|(class, name)| (name.clone(), json!(class)))
            .collect();
        json.insert("id2label".to_owned(), Value::Object(by_number));
        json.insert("label2id".to_owned(), Value::Object(by_name));
        json.insert(
            "problem_type".to_owned(),
            json!("single_label_classification"),
        );
    }
}

/// `Llama` of `LlamaForCausalLM`, `GPT2` of `GPT2LMHeadModel`.
fn stem(class: &str) -> Option<&str> {
    ["ForCausalLM", "LMHeadModel", "ForSequenceClassification"]
        .iter()
        .find_map(|end| class.strip_suffix(end))
}

/// The names of the classes in a `config.json`'s `id2label`, if they are numbered from 0 without a gap.
pub(crate) fn labels(json: &Map<String, Value>) -> Option<Vec<String>> {
    let names = json.get("id2label")?.as_object()?;
    (0..names.len())
        .map(|class| Some(names.get(&class.to_string())?.as_str()?.to_owned()))
        .collect()
}

/// A model's head.
#[derive(Module, Debug)]
pub enum Head {
    /// [`HEAD`]; none where it is the embedding.
    Lm(Option<Linear>),
    /// [`CLASSIFIER`] `[classes, hidden]`.
    Classifier(Linear),
}

impl Head {
    /// The layer, if it is one of its own.
    pub fn linear(&self) -> Option<&Linear> {
        match self {
            Self::Lm(head) => head.as_ref(),
            Self::Classifier(head) => Some(head),
        }
    }
}

impl Slots for Head {
    fn slots(&mut self, _: &str, f: &mut dyn FnMut(&str, Slot<'_>)) {
        match self {
            Self::Lm(head) => head.slots(HEAD, f),
            Self::Classifier(head) => head.slots(CLASSIFIER, f),
        }
    }

    fn slots_ref(&self, _: &str, f: &mut dyn FnMut(&str, SlotRef<'_>)) {
        match self {
            Self::Lm(head) => head.slots_ref(HEAD, f),
            Self::Classifier(head) => head.slots_ref(CLASSIFIER, f),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_says_what_transformers_says_of_a_classifier() {
        let mut json = json!({ "architectures": ["GPT2LMHeadModel"], "n_embd": 8 });
        let map = json.as_object_mut().unwrap();
        let labels_in = vec!["no".to_owned(), "yes".to_owned()];
        HeadConfig::SequenceClassification {
            labels: labels_in.clone(),
            stored: false,
        }
        .write(map);
        assert_eq!(labels(map), Some(labels_in));
        assert_eq!(
            json,
            json!({
                "architectures": ["GPT2ForSequenceClassification"],
                "n_embd": 8,
                "id2label": { "0": "no", "1": "yes" },
                "label2id": { "no": 0, "yes": 1 },
                "problem_type": "single_label_classification",
            })
        );
    }

    #[test]
    fn classes_with_a_gap_are_none() {
        let json = json!({ "id2label": { "0": "a", "2": "b" } });
        assert_eq!(labels(json.as_object().unwrap()), None);
    }
}
