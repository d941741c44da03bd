//! Text from a model: answers in a conversation, and plain continuation.

use std::ops::ControlFlow;
use std::time::Instant;

use enamel_data::{Message, TokenStream};
use enamel_model::{Sampling, generate};

use crate::base::LoadedBase;
use crate::error::TrainError;

/// What was written, and how fast.
#[derive(Clone, Debug)]
pub struct Reply {
    /// The text, special tokens left out.
    pub text: String,
    /// Tokens of the prompt, chat template included.
    pub prompt_tokens: usize,
    /// New tokens, the stopping one left out.
    pub tokens: usize,
    /// Seconds from the call to the last token.
    pub seconds: f64,
    /// What ended it.
    pub end: End,
}

/// What ended an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// A token that ends a turn or a text.
    Stop,
    /// `max_new_tokens`.
    Limit,
    /// The model's context, of so many tokens.
    Context(usize),
    /// Whoever listened.
    Listener,
}

/// A conversation with a model; each question sees the earlier ones and their answers.
pub struct Session {
    base: LoadedBase,
    system: Option<String>,
    messages: Vec<Message>,
}

impl Session {
    /// A conversation that has not begun. `base.model` speaks as it stands, adapter included.
    pub fn new(base: LoadedBase, system: Option<String>) -> Self {
        let mut session = Self {
            base,
            system,
            messages: Vec::new(),
        };
        session.reset();
        session
    }

    /// Forgets everything but the system message.
    pub fn reset(&mut self) {
        self.messages = self
            .system
            .iter()
            .map(|text| Message::system(text))
            .collect();
    }

    /// Asks and hands the answer on as it comes; `on_text` may end it.
    pub fn ask(
        &mut self,
        question: &str,
        sampling: &Sampling,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Reply, TrainError> {
        self.messages.push(Message::user(question));
        let reply = answer(&self.base, &self.messages, sampling, on_text);
        match &reply {
            Ok(reply) => self.messages.push(Message::assistant(&reply.text)),
            // A question that failed must not haunt the next one.
            Err(_) => drop(self.messages.pop()),
        }
        reply
    }
}

/// The assistant's next turn after `messages`.
pub fn answer(
    base: &LoadedBase,
    messages: &[Message],
    sampling: &Sampling,
    on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
) -> Result<Reply, TrainError> {
    base.open.require_tokenizer()?;
    let prompt = base.open.tokenizer.encode_chat(messages, true)?;
    write_on(base, &prompt, sampling, on_text)
}

/// Continues `text` as it stands, without a chat template; the tokenizer adds its BOS if it has one.
pub fn complete(
    base: &LoadedBase,
    text: &str,
    sampling: &Sampling,
    on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
) -> Result<Reply, TrainError> {
    base.open.require_tokenizer()?;
    let prompt = base.open.tokenizer.encode(text, true)?;
    write_on(base, &prompt, sampling, on_text)
}

fn write_on(
    base: &LoadedBase,
    prompt: &[u32],
    sampling: &Sampling,
    on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
) -> Result<Reply, TrainError> {
    let start = Instant::now();
    let mut stream = TokenStream::new(true);
    let mut text = String::new();
    let mut failure = None;
    let mut stopped = false;
    let tokens = generate(
        &base.model,
        prompt,
        &base.open.stop_ids(),
        sampling,
        &mut |id| match stream.push(&base.open.tokenizer, id) {
            Ok(piece) => {
                text.push_str(&piece);
                if !piece.is_empty() && on_text(&piece).is_break() {
                    stopped = true;
                    return ControlFlow::Break(());
                }
                ControlFlow::Continue(())
            }
            Err(error) => {
                failure = Some(error);
                ControlFlow::Break(())
            }
        },
    )?;
    if let Some(error) = failure {
        return Err(error.into());
    }
    let rest = stream.finish(&base.open.tokenizer)?;
    if !rest.is_empty() {
        text.push_str(&rest);
        // The text is over; whether the listener wants more does not matter any longer.
        let _ = on_text(&rest);
    }
    let context = base.model.config().context_length();
    let end = if stopped {
        End::Listener
    } else if tokens.len() >= sampling.max_new_tokens {
        End::Limit
    } else if prompt.len() + tokens.len() > context {
        End::Context(context)
    } else {
        End::Stop
    };
    Ok(Reply {
        text,
        prompt_tokens: prompt.len(),
        tokens: tokens.len(),
        seconds: start.elapsed().as_secs_f64(),
        end,
    })
}
