//! An answer in pieces: server-sent events.

use std::{convert::Infallible, fmt::Write, sync::Arc, time::Duration};

use axum::body::Bytes;
use futures_util::stream::{Stream, unfold};
use serde_json::Value as Json;
use tokio::sync::mpsc::Receiver;

use super::{Shared, journal::Entry};
use crate::{
    api::{ApiError, Reply},
    engine::{Event, Sent},
};

/// After so long without a piece a comment is sent: what is in between may close a silent
/// connection.
const SILENCE: Duration = Duration::from_secs(15);

struct Pieces {
    shared: Arc<Shared>,
    entry: Arc<Entry>,
    news: Receiver<Sent>,
    reply: Reply,
    has_begun: bool,
    has_ended: bool,
}

/// The pieces of an answer, as they come.
pub fn pieces(
    shared: Arc<Shared>,
    entry: Arc<Entry>,
    news: Receiver<Sent>,
    reply: Reply,
) -> impl Stream<Item = Result<Bytes, Infallible>> {
    let pieces = Pieces { shared, entry, news, reply, has_begun: false, has_ended: false };
    unfold(pieces, |mut pieces| async move {
        let text = pieces.next().await?;
        Some((Ok(Bytes::from(text)), pieces))
    })
}

impl Pieces {
    /// The next text to send.
    async fn next(&mut self) -> Option<String> {
        let mut out = String::new();
        while out.is_empty() {
            if self.has_ended {
                return None;
            }
            if !std::mem::replace(&mut self.has_begun, true) {
                self.reply.opening().iter().for_each(|piece| event(&mut out, piece));
                continue;
            }
            match tokio::time::timeout(SILENCE, self.news.recv()).await {
                Ok(sent) => self.take(sent, &mut out),
                Err(_) => out += ": the text is waiting\n\n",
            }
        }
        Some(out)
    }

    /// Writes what news there are.
    fn take(&mut self, sent: Option<Sent>, out: &mut String) {
        let error = match sent.map(|sent| (sent.choice, sent.event)) {
            Some((choice, Event::Written { text, tokens, end })) => {
                let tokenizer = self.shared.served.tokenizer();
                let pieces = self.reply.push(choice, &text, &tokens, end, tokenizer);
                pieces.iter().for_each(|piece| event(out, piece));
                if !self.reply.is_whole() {
                    return;
                }
                self.reply.closing().iter().for_each(|piece| event(out, piece));
                None
            }
            Some((_, Event::Failed(reason))) => Some(ApiError::internal(reason)),
            Some((_, Event::Stopped)) | None => Some(ApiError::stopping()),
        };
        match error {
            Some(error) => event(out, &error.to_json()),
            None => *out += "data: [DONE]\n\n",
        }
        self.entry.tell(self.reply.counts());
        self.has_ended = true;
    }
}

fn event(out: &mut String, json: &Json) {
    let _ = write!(out, "data: {json}\n\n");
}
