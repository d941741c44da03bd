//! Text generation: one pass over the prompt, then token by token with a cache.

use std::cmp::Ordering;
use std::ops::ControlFlow;

use burn::tensor::{Int, Tensor, TensorData};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::cache::Cache;
use crate::heads::Head;
use crate::model::Model;
use crate::nn::input::ModelInput;

/// How the next token is chosen, and how many at most.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 takes the likeliest token every time (greedy).
    pub temperature: f64,
    /// Only so many of the likeliest tokens are considered.
    pub top_k: Option<usize>,
    /// Only the likeliest tokens that together reach this probability are considered.
    pub top_p: Option<f64>,
    /// Decides the random choices: the same seed, the same text.
    pub seed: u64,
    /// Upper limit on new tokens.
    pub max_new_tokens: usize,
}

impl Sampling {
    /// The likeliest token every time.
    pub fn greedy(max_new_tokens: usize) -> Self {
        Self {
            temperature: 0.0,
            top_k: None,
            top_p: None,
            seed: 0,
            max_new_tokens,
        }
    }
}

/// Why no text could be generated.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum GenerateError {
    /// The head has classes, not tokens.
    #[error("the model classifies texts, it generates none: ask for classes with `enamel predict`")]
    NoLanguageHead,
    /// Nothing to continue.
    #[error("the prompt has no tokens; give at least the beginning-of-text token")]
    EmptyPrompt,
    /// More tokens than the model has positions for.
    #[error(
        "the prompt has {tokens} tokens, and the model's context ends at {context} \
         (max_position_embeddings and the rope settings of its config.json): shorten the prompt"
    )]
    TooLong {
        /// Tokens of the prompt.
        tokens: usize,
        /// What the model was made for.
        context: usize,
    },
    /// An id that the embedding has no row for.
    #[error(
        "the prompt holds token id {id}, but the model knows ids below {vocab_size}: does the \
         tokenizer belong to it?"
    )]
    TokenOutOfRange {
        /// The id.
        id: u32,
        /// The vocabulary's size.
        vocab_size: usize,
    },
    /// A sampling setting outside its range.
    #[error("{setting} is {value}; it must be {range}")]
    BadSetting {
        /// The setting's name.
        setting: &'static str,
        /// What it is.
        value: f64,
        /// What it may be.
        range: &'static str,
    },
    /// The model's output is not a number.
    #[error(
        "the logits after {tokens} tokens are not finite: the weights or the adapter are damaged"
    )]
    NotFinite {
        /// Tokens read so far.
        tokens: usize,
    },
    /// The device could not deliver the logits.
    #[error("reading the logits failed: {0}")]
    Device(String),
}

/// Continues `prompt`. Each new token is handed to `on_token`, which may end it; a token of `stop`
/// ends it too and is neither handed on nor returned, and so does the end of the model's context
/// ([`context_length`](crate::config::RopeConfig::context_length)). The model is used as it stands, adapters
/// included; evaluate a training model through [`burn::module::Module::valid`].
pub fn generate(
    model: &Model,
    prompt: &[u32],
    stop: &[u32],
    sampling: &Sampling,
    on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
) -> Result<Vec<u32>, GenerateError> {
    check(model, prompt, sampling)?;
    let device = model.device();
    let mut rng = ChaCha8Rng::seed_from_u64(sampling.seed);
    let mut cache = Cache::new();
    let mut produced = Vec::new();
    let context = model.config().context_length();
    let mut next: Vec<i64> = prompt.iter().map(|id| i64::from(*id)).collect();
    while produced.len() < sampling.max_new_tokens {
        let tokens = next.len();
        if cache.len() + tokens > context {
            break;
        }
        let ids: Tensor<2, Int> = Tensor::from_data(TensorData::new(next, [1, tokens]), &device);
        let hidden = model.forward_hidden(&ModelInput::new(ids), Some(&mut cache));
        let [_, _, width] = hidden.dims();
        let last = hidden.narrow(1, tokens - 1, 1).reshape([1, width]);
        let logits = model
            .logits(last)
            .try_into_vec_as::<f32>()
            .map_err(|error| GenerateError::Device(error.to_string()))?;
        if !logits.iter().any(|x| x.is_finite()) || logits.iter().any(|x| x.is_nan()) {
            return Err(GenerateError::NotFinite {
                tokens: cache.len(),
            });
        }
        let id = choose(&logits, sampling, &mut rng);
        if stop.contains(&id) {
            break;
        }
        produced.push(id);
        if on_token(id).is_break() {
            break;
        }
        next = vec![i64::from(id)];
    }
    Ok(produced)
}

fn check(model: &Model, prompt: &[u32], sampling: &Sampling) -> Result<(), GenerateError> {
    if matches!(model.head, Head::Classifier(_)) {
        return Err(GenerateError::NoLanguageHead);
    }
    if prompt.is_empty() {
        return Err(GenerateError::EmptyPrompt);
    }
    let vocab_size = model.config().vocab_size;
    if let Some(id) = prompt.iter().find(|id| **id as usize >= vocab_size) {
        return Err(GenerateError::TokenOutOfRange {
            id: *id,
            vocab_size,
        });
    }
    let (tokens, context) = (prompt.len(), model.config().context_length());
    if tokens > context {
        return Err(GenerateError::TooLong { tokens, context });
    }
    let bad = |setting, value, range| {
        Err(GenerateError::BadSetting {
            setting,
            value,
            range,
        })
    };
    let temperature = sampling.temperature;
    if !temperature.is_finite() || temperature < 0.0 {
        return bad(
            "temperature",
            temperature,
            "0 (greedy) or a positive number",
        );
    }
    if let Some(p) = sampling.top_p.filter(|p| !(*p > 0.0 && *p <= 1.0)) {
        return bad("top_p", p, "above 0 and at most 1");
    }
    if sampling.top_k == Some(0) {
        return bad("top_k", 0.0, "at least 1");
    }
    Ok(())
}

/// The next token. Equal logits are settled in favour of the lower id.
fn choose(logits: &[f32], sampling: &Sampling, rng: &mut ChaCha8Rng) -> u32 {
    let likeliest_first =
        |a: &u32, b: &u32| match logits[*b as usize].total_cmp(&logits[*a as usize]) {
            Ordering::Equal => a.cmp(b),
            other => other,
        };
    if sampling.temperature == 0.0 {
        return (0..logits.len() as u32)
            .min_by(likeliest_first)
            .unwrap_or(0);
    }
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    if let Some(k) = sampling.top_k.filter(|k| *k < ids.len()) {
        ids.select_nth_unstable_by(k - 1, likeliest_first);
        ids.truncate(k);
    }
    // In this order the sums below, and so the choice, depend on nothing but the logits.
    ids.sort_unstable_by(likeliest_first);
    let highest = f64::from(logits[ids[0] as usize]);
    let mut weights: Vec<f64> = ids
        .iter()
        .map(|id| ((f64::from(logits[*id as usize]) - highest) / sampling.temperature).exp())
        .collect();
    if let Some(p) = sampling.top_p {
        let enough = p * weights.iter().sum::<f64>();
        let mut sum = 0.0;
        let kept = weights
            .iter()
            .take_while(|w| (sum < enough, sum += **w).0)
            .count()
            .max(1);
        weights.truncate(kept);
    }
    let mut left = rng.random::<f64>() * weights.iter().sum::<f64>();
    for (id, weight) in ids.iter().zip(&weights) {
        left -= weight;
        if left < 0.0 {
            return *id;
        }
    }
    ids[weights.len() - 1] // rounding left a trace of the last weight
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::testing::{devices, ids, tiny_config, values};
    use burn::tensor::Device;
    use serde_json::json;

    fn model(device: &Device) -> Model {
        Model::random(&tiny_config(json!({})), 11, device).unwrap()
    }

    fn run(model: &Model, stop: &[u32], sampling: &Sampling) -> Vec<u32> {
        let mut streamed = Vec::new();
        let produced = generate(model, &[1, 2, 3], stop, sampling, &mut |id| {
            streamed.push(id);
            ControlFlow::Continue(())
        })
        .unwrap();
        assert_eq!(produced, streamed);
        produced
    }

    fn sampled(seed: u64) -> Sampling {
        let (top_k, top_p) = (Some(20), Some(0.95));
        Sampling {
            temperature: 1.5,
            top_k,
            top_p,
            seed,
            max_new_tokens: 30,
        }
    }

    #[test]
    fn greedy_takes_the_largest_logit_of_a_full_pass() {
        for device in devices() {
            let model = model(&device);
            let mut text = vec![1i64, 2, 3];
            for id in run(&model, &[], &Sampling::greedy(12)) {
                let hidden = model.forward_hidden(&ModelInput::new(ids(&[&text], &device)), None);
                let last = hidden.narrow(1, text.len() - 1, 1).reshape([1, 16]);
                let logits = values(model.logits(last));
                assert!(logits.iter().all(|x| *x <= logits[id as usize]));
                text.push(i64::from(id));
            }
            assert_eq!(text.len(), 15);
        }
    }

    #[test]
    fn the_seed_decides() {
        let model = model(&Device::flex());
        assert_eq!(run(&model, &[], &sampled(4)), run(&model, &[], &sampled(4)));
        assert_ne!(run(&model, &[], &sampled(4)), run(&model, &[], &sampled(5)));
        let narrow = Sampling {
            top_k: Some(1),
            ..sampled(4)
        };
        assert_eq!(
            run(&model, &[], &narrow),
            run(&model, &[], &Sampling::greedy(30))
        );
        let narrow = Sampling {
            top_k: None,
            top_p: Some(1e-9),
            ..sampled(4)
        };
        assert_eq!(
            run(&model, &[], &narrow),
            run(&model, &[], &Sampling::greedy(30))
        );
    }

    #[test]
    fn stop_tokens_and_the_callback_end_it() {
        let model = model(&Device::flex());
        let all = run(&model, &[], &sampled(4));
        let stop = all[5];
        let until = all.iter().position(|id| *id == stop).unwrap();
        assert_eq!(run(&model, &[stop], &sampled(4)), all[..until]);
        let mut calls = 0;
        let ended = generate(&model, &[1, 2, 3], &[], &sampled(4), &mut |_| {
            calls += 1;
            if calls == 3 {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        });
        assert_eq!(ended.unwrap(), all[..3]);
    }

    #[test]
    fn the_context_ends_it() {
        let model = model(&Device::flex());
        // 32 positions: the last of them has a next token that no position is left for.
        let endless = Sampling {
            max_new_tokens: usize::MAX,
            ..sampled(4)
        };
        assert_eq!(run(&model, &[], &endless).len(), 32 - 3 + 1);
    }

    #[test]
    fn sampling_follows_the_probabilities() {
        // Softmax of these at temperature 2 is 1/2, 1/4, 1/8, 1/8.
        let logits: Vec<f32> = [8f32, 4.0, 2.0, 2.0].iter().map(|x| 2.0 * x.ln()).collect();
        let frequencies = |top_k, top_p| {
            let sampling = Sampling {
                temperature: 2.0,
                top_k,
                top_p,
                seed: 0,
                max_new_tokens: 1,
            };
            let mut rng = ChaCha8Rng::seed_from_u64(1);
            let mut counts = [0.0; 4];
            for _ in 0..8000 {
                counts[choose(&logits, &sampling, &mut rng) as usize] += 1.0 / 8000.0;
            }
            counts
        };
        let check = |got: [f64; 4], expected: [f64; 4]| {
            // Four standard deviations of a frequency of one half among 8000.
            let close = got.iter().zip(expected).all(|(a, b)| (a - b).abs() < 0.023);
            assert!(close, "{got:?}");
        };
        check(frequencies(None, None), [0.5, 0.25, 0.125, 0.125]);
        check(frequencies(Some(2), None), [2.0 / 3.0, 1.0 / 3.0, 0.0, 0.0]);
        // The first two reach three quarters exactly; a little more needs the third.
        check(
            frequencies(None, Some(0.74)),
            [2.0 / 3.0, 1.0 / 3.0, 0.0, 0.0],
        );
        check(
            frequencies(None, Some(0.76)),
            [4.0 / 7.0, 2.0 / 7.0, 1.0 / 7.0, 0.0],
        );
    }

    #[test]
    fn unusable_requests_are_errors() {
        let model = model(&Device::flex());
        let mut go = |_| ControlFlow::Continue(());
        let mut with = |prompt: &[u32], sampling: &Sampling| {
            generate(&model, prompt, &[], sampling, &mut go).unwrap_err()
        };
        assert_eq!(with(&[], &sampled(1)), GenerateError::EmptyPrompt);
        let long = GenerateError::TooLong {
            tokens: 33,
            context: 32,
        };
        assert_eq!(with(&[1; 33], &sampled(1)), long);
        let out = GenerateError::TokenOutOfRange {
            id: 40,
            vocab_size: 40,
        };
        assert_eq!(with(&[1, 40], &sampled(1)), out);
        for bad in [
            Sampling {
                temperature: -1.0,
                ..sampled(1)
            },
            Sampling {
                temperature: f64::NAN,
                ..sampled(1)
            },
            Sampling {
                top_p: Some(0.0),
                ..sampled(1)
            },
            Sampling {
                top_k: Some(0),
                ..sampled(1)
            },
        ] {
            let error = with(&[1], &bad);
            assert!(matches!(error, GenerateError::BadSetting { .. }), "{error}");
        }
    }
}
