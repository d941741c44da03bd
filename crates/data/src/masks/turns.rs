//! Where the assistant's turns lie in a rendered conversation whose template does not say so.
//!
//! Turn `i` starts where the rendering of the messages before it ends, generation prompt included, and ends where
//! the rendering of the messages up to and with it does, if both begin the full rendering. Else (a template that
//! rewrites earlier turns, moves the system prompt, closes the conversation with a token of its own, or refuses a part
//! of it) the turn's content is replaced by a sentinel: what stands before and after it bounds the content, and
//! what follows it where nothing else does is the turn's closing text. What fits none of this is an error of the row.
//!
//! That takes renderings of the whole conversation for each turn. A long one is rendered once with a mark in each
//! message instead: what stands between a message's mark and the next turn's start, and between a turn's mark and its
//! end, is learned from turns found as above, the first, the last and each that looks like none before.

use std::cell::Cell;
use std::ops::Range;

use crate::chat_template::{ChatTemplate, RenderOptions, TemplateError};
use crate::error::BadReason;
use crate::message::Message;
use crate::tokenizer::Tokenizer;

/// Bytes rendered to find every turn by itself; above, turns are found by marks.
const EACH_TURN: usize = 1 << 20;
/// Bytes rendered for one conversation in all; a template that would need more cannot be followed.
const ALL_TURNS: usize = 1 << 24;
/// Open and close a mark; the digits between them say which message it is in. Unicode noncharacters, as those
/// of generation blocks.
const MARK_OPEN: char = '\u{FDD2}';
const MARK_CLOSE: char = '\u{FDD3}';
const MARK_DIGIT: u32 = 0xFDD4;

/// What a sentinel in a message stands for.
#[derive(Clone, Copy)]
enum Place {
    /// All of its content.
    Content,
    /// The end of the last text in it, its tool calls' included.
    Last,
}

impl Place {
    const BOTH: [Self; 2] = [Self::Content, Self::Last];
}

/// The rendered text before and after a sentinel.
type Around = Result<(String, String), BadReason>;

/// A conversation and its rendering.
pub(crate) struct TurnFinder<'a> {
    tokenizer: &'a Tokenizer,
    template: &'a ChatTemplate,
    messages: &'a [Message],
    options: RenderOptions<'a>,
    text: &'a str,
    /// Bytes rendered so far.
    rendered: Cell<usize>,
}

impl<'a> TurnFinder<'a> {
    /// `text` is the rendering of all messages with `options`, without a generation prompt.
    pub(crate) fn new(
        tokenizer: &'a Tokenizer,
        template: &'a ChatTemplate,
        messages: &'a [Message],
        options: RenderOptions<'a>,
        text: &'a str,
    ) -> Self {
        Self {
            tokenizer,
            template,
            messages,
            options,
            text,
            rendered: Cell::new(0),
        }
    }

    /// The spans of the turns at `wanted` (in order), each to the end of its end-of-turn token.
    pub(crate) fn find_all(&self, wanted: &[usize]) -> Result<Vec<Range<usize>>, BadReason> {
        let each = self
            .text
            .len()
            .saturating_mul(wanted.len())
            .saturating_mul(2);
        if each <= EACH_TURN {
            return wanted.iter().map(|&i| self.find(i)).collect();
        }
        self.find_by_marks(wanted)
    }

    /// Those of the template's generation blocks that are of the turns at `wanted`, of all `turns`.
    pub(crate) fn blocks_of(
        &self,
        blocks: Vec<Range<usize>>,
        turns: &[usize],
        wanted: &[usize],
    ) -> Result<Vec<Range<usize>>, BadReason> {
        if wanted == turns {
            return Ok(blocks);
        }
        if blocks.len() == turns.len() {
            let of_turns = blocks.into_iter().zip(turns);
            let kept = of_turns.filter(|(_, turn)| wanted.contains(turn));
            return Ok(kept.map(|(block, _)| block).collect());
        }
        // Several blocks in a turn, or turns without one.
        let spans = self.find_all(wanted)?;
        let in_turn = |block: &Range<usize>| {
            let meets = |span: &Range<usize>| block.start < span.end && span.start < block.end;
            spans.iter().any(meets)
        };
        let kept: Vec<_> = blocks.into_iter().filter(in_turn).collect();
        match kept.is_empty() {
            true => Err(boundary(
                wanted.first().copied().unwrap_or(0),
                "the template has generation blocks, and none lies in it",
            )),
            false => Ok(kept),
        }
    }

    /// The span of turn `i`, from renderings of its own.
    fn find(&self, i: usize) -> Result<Range<usize>, BadReason> {
        let begins = |prefix: Option<String>| {
            prefix
                .filter(|prefix| self.text.starts_with(prefix.as_str()))
                .map(|prefix| prefix.len())
        };
        let is_last = i.saturating_add(1) == self.messages.len();
        let start = begins(self.prefix(i, true)?);
        let end = match is_last {
            true => Some(self.text.len()),
            false => begins(self.prefix(i.saturating_add(1), false)?),
        };
        let span = match (start, end) {
            (Some(start), Some(end)) if start < end => start..end,
            _ => self.find_by_sentinel(i, start, end)?,
        };
        let turn = self.text.get(span.clone()).unwrap_or_default();
        let end = match self.tokenizer.end_of_turn_length(turn) {
            Some(length) => span.start.saturating_add(length),
            None => span.end,
        };
        Ok(span.start..end)
    }

    /// The first `count` messages rendered; `None` where the template fails on them.
    fn prefix(&self, count: usize, prompt: bool) -> Result<Option<String>, BadReason> {
        let messages = self.messages.get(..count).unwrap_or(self.messages);
        Ok(self.render(messages, prompt)?.ok())
    }

    fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<Result<String, TemplateError>, BadReason> {
        let spent = self.rendered.get();
        if spent > ALL_TURNS {
            return Err(boundary(
                messages.len(),
                "the conversation is too long to render it for each of its turns, and this template leaves no other way",
            ));
        }
        let options = RenderOptions {
            add_generation_prompt,
            ..self.options
        };
        let rendered = self.template.render_with(messages, options);
        // One that takes too long is not tried again with each turn.
        if let Err(error @ TemplateError::Budget { .. }) = rendered {
            return Err(error.into());
        }
        // A failure may have taken as long as a rendering.
        let cost = rendered.as_ref().map_or(self.text.len(), String::len);
        self.rendered.set(spent.saturating_add(cost));
        Ok(rendered)
    }

    fn find_by_sentinel(
        &self,
        i: usize,
        start: Option<usize>,
        end: Option<usize>,
    ) -> Result<Range<usize>, BadReason> {
        let content = self.around(i, self.messages.len(), false, Place::Content);
        let start = match start {
            Some(start) => start,
            None => self.start(i, &content)?,
        };
        let end = match end {
            Some(end) => end,
            None => self.end(i, content)?,
        };
        if start >= end {
            return Err(boundary(i, "the turn has no text of its own"));
        }
        Ok(start..end)
    }

    /// Where turn `i` starts; `content` is what stands around its content.
    fn start(&self, i: usize, content: &Around) -> Result<usize, BadReason> {
        let before = content.as_ref().map(|(before, _)| before.as_str());
        let at_most = before.map_or(self.text.len(), str::len);
        if let Some(start) = self.start_behind_the_one_before(i, at_most) {
            return Ok(start);
        }
        match before {
            Ok(before) if self.text.starts_with(before) => Ok(before.len()),
            Ok(_) => Err(boundary(i, "what precedes the turn depends on its content")),
            Err(error) => Err(error.clone()),
        }
    }

    /// Where turn `i` starts by what a generation prompt puts between it and the text of the message before it, wherever
    /// that text stands; `None` where that does not fit. It starts at `at_most` or before.
    fn start_behind_the_one_before(&self, i: usize, at_most: usize) -> Option<usize> {
        let before = i.checked_sub(1)?;
        Place::BOTH.into_iter().find_map(|place| {
            let (_, prompt) = self.around(before, i, true, place).ok()?;
            let (_, rest) = self
                .around(before, self.messages.len(), false, place)
                .ok()?;
            let fits = rest.starts_with(&prompt) && self.text.ends_with(&rest);
            let start = self.text.len().checked_sub(rest.len())?;
            let start = start.checked_add(prompt.len())?;
            (fits && start <= at_most).then_some(start)
        })
    }

    /// Where turn `i` ends; `content` is what stands around its content.
    fn end(&self, i: usize, content: Around) -> Result<usize, BadReason> {
        // A turn that calls tools may be written without its content.
        let (place, after) = match content {
            Ok((_, after)) => (Place::Content, after),
            Err(error) => match self.around(i, self.messages.len(), false, Place::Last) {
                Ok((_, after)) => (Place::Last, after),
                Err(_) => return Err(error),
            },
        };
        let content_end = self.text.strip_suffix(after.as_str()).map(str::len);
        let content_end = content_end
            .ok_or_else(|| boundary(i, "what follows the turn depends on its content"))?;
        Ok(content_end.saturating_add(self.closing(i, &after, place)?))
    }

    /// How many bytes of `after`, which follows turn `i`'s text at `place`, close the turn.
    fn closing(&self, i: usize, after: &str, place: Place) -> Result<usize, BadReason> {
        let fits = |closing: &str| {
            let either = [closing, closing.trim_end()].into_iter();
            let mut fitting = either.filter(|c| !c.is_empty() && after.starts_with(c));
            fitting.next().map(str::len)
        };
        // What closes the turn when nothing follows it also closes it here.
        let count = i.saturating_add(1);
        let alone = self.around(i, count, false, place);
        if let Some(length) = alone.as_ref().ok().and_then(|(_, closing)| fits(closing)) {
            return Ok(length);
        }
        // Unless the conversation's end has a token of its own, which is not there before a generation prompt.
        if let Ok((_, before_prompt)) = self.around(i, count, true, place) {
            let prompt = self.generation_prompt(i)?;
            let closing = prompt.and_then(|prompt| before_prompt.strip_suffix(prompt.as_str()));
            if let Some(closing) = closing.filter(|c| !c.is_empty() && after.starts_with(c)) {
                return Ok(closing.len());
            }
            if let Ok((_, closing)) = &alone {
                let shared = shared_length(closing, &before_prompt);
                let shared = shared.min(shared_length(closing, after));
                let shared = closing.get(..shared).unwrap_or_default();
                if let Some(length) = self.whole_closing(shared) {
                    return Ok(length);
                }
            }
        }
        // A template that refuses a part of a conversation: what closes the last turn closes this one.
        if alone.is_err() {
            let last = self.messages.len().saturating_sub(1);
            let role = self.messages.last().map(Message::role);
            if last != i && role == Some("assistant") {
                let (_, closing) = self.around(last, self.messages.len(), false, place)?;
                if let Some(length) = fits(&closing) {
                    return Ok(length);
                }
            }
            let user = [Message::user("question")];
            let turn = self.messages.get(i).cloned();
            let probe: Vec<Message> = user.into_iter().chain(turn).collect();
            let (_, closing) = self.around_of(&probe, 1, false, (i, place))?;
            if let Some(length) = fits(&closing) {
                return Ok(length);
            }
        }
        let closing = alone.map(|(_, closing)| closing).unwrap_or_default();
        Err(boundary(
            i,
            &format!("the turn ends with {closing:?} when it is the last one, but not here"),
        ))
    }

    /// The generation prompt behind messages before `i`, where it is only added to them.
    fn generation_prompt(&self, i: usize) -> Result<Option<String>, BadReason> {
        let before = self.messages.get(..i).unwrap_or_default();
        let asks = before.iter().rposition(|m| m.role() != "assistant");
        let question = [Message::user("question")];
        // Behind an answer, its end may change as well.
        let asking = asks.and_then(|last| before.get(..=last));
        for messages in [Some(before), asking, Some(&question)]
            .into_iter()
            .flatten()
        {
            let with = self.render(messages, true)?;
            let without = self.render(messages, false)?;
            if let (Ok(with), Ok(without)) = (with, without)
                && let Some(prompt) = with.strip_prefix(without.as_str())
                && !prompt.is_empty()
            {
                return Ok(Some(prompt.to_owned()));
            }
        }
        Ok(None)
    }

    /// The part of `shared` that is surely of the turn: up to its last special token or its last line break, since
    /// what comes after the turn may begin with the same letters whichever it is.
    fn whole_closing(&self, shared: &str) -> Option<usize> {
        let mut end = shared.len();
        while end > 0 {
            let text = shared.get(..end).unwrap_or_default();
            if text.ends_with('\n') || self.tokenizer.end_of_turn_length(text) == Some(end) {
                return Some(end);
            }
            end = text.char_indices().next_back().map_or(0, |(at, _)| at);
        }
        None
    }

    /// The rendered text before and after a sentinel at `place` of message `i`, of the first `count` messages.
    fn around(&self, i: usize, count: usize, prompt: bool, place: Place) -> Around {
        let messages = self.messages.get(..count).unwrap_or(self.messages);
        self.around_of(messages, i, prompt, (i, place))
    }

    /// The same for message `at` of others; errors name message `index`.
    fn around_of(
        &self,
        messages: &[Message],
        at: usize,
        prompt: bool,
        (index, place): (usize, Place),
    ) -> Around {
        let mut sentinel = String::from("EnamelTurnSentinel");
        while self.text.contains(&sentinel) {
            sentinel.push('x');
        }
        let unwritten = || boundary(index, "the template does not write the message's content");
        let mut messages = messages.to_vec();
        if let Some(message) = messages.get_mut(at) {
            *message = match place {
                Place::Content => message.with_content(&sentinel),
                Place::Last => message.with_mark(&sentinel).ok_or_else(unwritten)?,
            };
        }
        let text = self.render(&messages, prompt)??;
        let (before, after) = text.split_once(&sentinel).ok_or_else(unwritten)?;
        if after.contains(&sentinel) {
            return Err(boundary(
                index,
                "the template writes the content more than once",
            ));
        }
        Ok((before.to_owned(), after.to_owned()))
    }

    fn find_by_marks(&self, wanted: &[usize]) -> Result<Vec<Range<usize>>, BadReason> {
        let marks = self.marks()?;
        let mark = |i: usize| marks.get(i).copied().flatten();
        // Longest first: a generation prompt that says more is met before one that says less.
        let mut openers: Vec<&str> = Vec::new();
        let mut closers: Vec<&str> = Vec::new();
        let learn = |known: &mut Vec<&'a str>, text: &'a str| {
            if !known.contains(&text) {
                known.push(text);
                known.sort_by_key(|text| std::cmp::Reverse(text.len()));
            }
        };
        let mut found: Vec<Option<Range<usize>>> = vec![None; wanted.len()];
        let ends = [0, wanted.len().saturating_sub(1)];
        for at in ends.into_iter().chain(0..wanted.len()) {
            let (Some(&i), Some(slot)) = (wanted.get(at), found.get_mut(at)) else {
                continue;
            };
            if slot.is_some() {
                continue;
            }
            let before = i.checked_sub(1).and_then(mark);
            let behind = |mark: Option<usize>, known: &[&str]| {
                let mark = mark?;
                let rest = self.text.get(mark..)?;
                let fits = known.iter().find(|known| rest.starts_with(**known))?;
                mark.checked_add(fits.len())
            };
            let span = match (behind(before, &openers), behind(mark(i), &closers)) {
                (Some(start), Some(end)) if start < end && !ends.contains(&at) => start..end,
                _ => {
                    let span = self.find(i)?;
                    if let Some(text) = before.and_then(|mark| self.text.get(mark..span.start)) {
                        learn(&mut openers, text);
                    }
                    if let Some(text) = mark(i).and_then(|mark| self.text.get(mark..span.end)) {
                        learn(&mut closers, text);
                    }
                    span
                }
            };
            *slot = Some(span);
        }
        Ok(found.into_iter().flatten().collect())
    }

    /// Where each message's mark lies in the text, for those whose mark is written once; none at all where marks
    /// change what the template writes.
    fn marks(&self) -> Result<Vec<Option<usize>>, BadReason> {
        let none = vec![None; self.messages.len()];
        let is_mark =
            |c: char| (MARK_OPEN as u32..MARK_DIGIT.saturating_add(16)).contains(&(c as u32));
        if self.text.contains(is_mark) {
            return Ok(none);
        }
        let marked: Vec<Message> = self
            .messages
            .iter()
            .enumerate()
            .map(|(i, message)| {
                message
                    .with_mark(&mark_of(i))
                    .unwrap_or_else(|| message.clone())
            })
            .collect();
        let Ok(rendered) = self.render(&marked, false)? else {
            return Ok(none);
        };
        let mut text = String::with_capacity(self.text.len());
        let mut marks = none.clone();
        let mut repeated = vec![false; marks.len()];
        let mut number: Option<usize> = None;
        for c in rendered.chars() {
            match (c, number) {
                (MARK_OPEN, _) => number = Some(0),
                (MARK_CLOSE, Some(i)) => {
                    number = None;
                    if let (Some(mark), Some(repeated)) = (marks.get_mut(i), repeated.get_mut(i)) {
                        *repeated |= mark.is_some();
                        *mark = Some(text.len());
                    }
                }
                (c, Some(i)) if is_mark(c) => {
                    let digit = (c as u32).saturating_sub(MARK_DIGIT) as usize;
                    number = Some(i.saturating_mul(16).saturating_add(digit));
                }
                (c, _) => text.push(c),
            }
        }
        if text != self.text {
            return Ok(none);
        }
        for (mark, repeated) in marks.iter_mut().zip(repeated) {
            if repeated {
                *mark = None;
            }
        }
        Ok(marks)
    }
}

fn mark_of(i: usize) -> String {
    let mut mark = String::from(MARK_OPEN);
    for digit in format!("{i:x}").chars() {
        let digit = digit.to_digit(16).unwrap_or(0).saturating_add(MARK_DIGIT);
        mark.extend(char::from_u32(digit));
    }
    mark.push(MARK_CLOSE);
    mark
}

/// The length of what both texts begin with, in whole characters.
fn shared_length(a: &str, b: &str) -> usize {
    let same = a.char_indices().zip(b.chars());
    same.take_while(|((_, a), b)| a == b)
        .last()
        .map_or(0, |((at, c), _)| at.saturating_add(c.len_utf8()))
}

fn boundary(index: usize, detail: &str) -> BadReason {
    BadReason::Boundary {
        index,
        detail: detail.to_owned(),
    }
}

#[cfg(test)]
mod tests;
