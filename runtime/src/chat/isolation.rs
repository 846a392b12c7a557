//! Chat templates in a process of their own.
//!
//! A template comes from a file of unknown origin. The engine counts its steps, but no engine
//! bounds what one of them takes: a text that is doubled again and again, an indent of a gigabyte,
//! a list that holds itself. In a process of its own the system does, and its end is a sentence
//! here.

use std::{
    io::{self, Read, Write},
    process::{Command, ExitStatus, Stdio},
    sync::OnceLock,
};

use serde_json::{Value as Json, json};

use super::template::{Chat, ChatTemplate, Message};
use crate::{Result, RuntimeError};

/// Address space of such a process, program included.
#[cfg(unix)]
const MEMORY_BYTES: u64 = 192 << 20;

/// Its time on a processor.
#[cfg(unix)]
const SECONDS: u64 = 1;

static PROGRAM: OnceLock<fn() -> Command> = OnceLock::new();

/// From here on, this process has chat templates rendered by processes that `program` starts; they
/// must call [`render_for_parent`] before anything else. Without it, templates run in this process,
/// bounded in their steps and their output only.
pub fn isolate_chat_templates(program: fn() -> Command) {
    // The first one stays.
    let _ = PROGRAM.set(program);
}

/// Renders what the parent process asks for on standard input, within the limits of a template.
///
/// # Errors
/// If the parent does not listen, or if there are no limits to be had.
pub fn render_for_parent() -> io::Result<()> {
    set_limits()?;
    let mut request = Vec::new();
    io::stdin().read_to_end(&mut request)?;
    let request: Json = serde_json::from_slice(&request)?;
    let text = |value: &Json| value.as_str().unwrap_or_default().to_owned();
    let template = &request["template"];
    let [source, bos, eos] = ["source", "bos", "eos"].map(|key| text(&template[key]));
    let list = |json: &Json| json.as_array().cloned().unwrap_or_default();
    let messages =
        |chat: &Json| list(&chat["messages"]).iter().map(Message::from_json).collect::<Vec<_>>();
    let asked = list(&request["chats"]);
    let held: Vec<_> = asked.iter().map(|chat| (messages(chat), list(&chat["tools"]))).collect();
    let chats = asked.iter().zip(&held).map(|(chat, (messages, tools))| Chat {
        messages,
        tools,
        add_generation_prompt: chat["add_generation_prompt"] == true,
    });
    let chats: Vec<_> = chats.collect();
    let answer = match ChatTemplate::new(&source, &bos, &eos).render_here(&chats) {
        Ok(texts) => json!({ "texts": texts.iter().map(text_or_error).collect::<Vec<_>>() }),
        Err(error) => json!({ "error": reason(&error) }),
    };
    io::stdout().write_all(answer.to_string().as_bytes())
}

fn text_or_error(text: &Result<String>) -> Json {
    match text {
        Ok(text) => json!({ "text": text }),
        Err(error) => json!({ "error": reason(error) }),
    }
}

/// What the engine says.
pub(super) fn reason(error: &RuntimeError) -> String {
    let source = std::error::Error::source(error);
    let chain = std::iter::successors(source, |&error| error.source());
    chain.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// What another process makes of `template` and `chats`; `None` if templates run in this one.
pub(super) fn render_elsewhere(
    template: &Json,
    chats: &[Chat<'_>],
) -> Option<Result<Vec<Result<String>>>> {
    let program = PROGRAM.get()?;
    let chat = |chat: &Chat<'_>| {
        let messages: Vec<_> = chat.messages.iter().map(Message::to_json).collect();
        json!({
            "messages": messages,
            "tools": chat.tools,
            "add_generation_prompt": chat.add_generation_prompt,
        })
    };
    let chats: Vec<_> = chats.iter().map(chat).collect();
    let request = json!({ "template": template, "chats": chats });
    Some(ask(&mut program(), &request))
}

fn ask(program: &mut Command, request: &Json) -> Result<Vec<Result<String>>> {
    let answer = answer(program, request)
        .map_err(|error| RuntimeError::chat_template("be rendered", error))?;
    if let Some(error) = answer["error"].as_str() {
        return Err(RuntimeError::chat_template("be read", error));
    }
    let text = |text: &Json| match text["text"].as_str() {
        Some(text) => Ok(text.to_owned()),
        None => Err(RuntimeError::chat_template(
            "be rendered",
            text["error"].as_str().unwrap_or_default(),
        )),
    };
    Ok(answer["texts"].as_array().into_iter().flatten().map(text).collect())
}

/// What a process answers to a request.
fn answer(program: &mut Command, request: &Json) -> io::Result<Json> {
    let mut child =
        program.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        // Of a process that has ended already, the status says why.
        let _ = stdin.write_all(request.to_string().as_bytes());
    }
    let output = child.wait_with_output()?;
    serde_json::from_slice(&output.stdout).map_err(|_| io::Error::other(end_of(output.status)))
}

#[cfg(unix)]
fn end_of(status: ExitStatus) -> String {
    use rustix::process::Signal;
    use std::os::unix::process::ExitStatusExt;
    let ended_by = |signal: Signal| status.signal() == Some(signal.as_raw());
    match ended_by(Signal::XCPU) || ended_by(Signal::KILL) {
        true => format!("it takes more than {SECONDS} s"),
        false => format!(
            "it takes more than {} MB of memory, or is nested too deeply",
            MEMORY_BYTES / 1_000_000
        ),
    }
}

#[cfg(not(unix))]
fn end_of(status: ExitStatus) -> String {
    format!("its process ended with {status}")
}

#[cfg(unix)]
fn set_limits() -> io::Result<()> {
    use rustix::process::{Resource, Rlimit, setrlimit};
    for (resource, limit) in
        [(Resource::As, MEMORY_BYTES), (Resource::Cpu, SECONDS), (Resource::Core, 0)]
    {
        setrlimit(resource, Rlimit { current: Some(limit), maximum: Some(limit) })?;
    }
    Ok(())
}

/// Elsewhere only the end of such a process does not reach this one.
#[cfg(not(unix))]
fn set_limits() -> io::Result<()> {
    Ok(())
}
