//! The model's own chat template, run without file, network or attribute access.

use std::io;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, Error, ErrorKind, Template, Value, context};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde_json::{Map, Value as Json, json};

use super::generation::without_generation_blocks;
use super::isolation::render_elsewhere;
use super::strftime::strftime_now;
use super::to_json::to_json;
use crate::{Result, RuntimeError};

/// Template instructions that one rendering may take: seconds at most. A chat of a thousand
/// messages needs some ten thousand.
const FUEL: u64 = 5_000_000;

/// The longest text that a template may write, far above what any context holds.
const OUTPUT_LIMIT_BYTES: usize = 16 << 20;

/// Nested template calls: far below what the smallest thread stack holds.
const RECURSION_LIMIT: usize = 100;

/// One message of a chat.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant`, or what else the template knows.
    pub role: String,
    /// The text.
    pub content: String,
    /// What else a template may read of it, such as `tool_calls`.
    pub more: Map<String, Json>,
}

impl Message {
    /// A message of a text and nothing else.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into(), more: Map::new() }
    }

    /// What a template sees: an object with `role`, `content` and what else there is.
    pub(super) fn to_json(&self) -> Json {
        let own = [("role", &self.role), ("content", &self.content)];
        let own = own.map(|(key, text)| (key.to_owned(), text.as_str().into()));
        let more = self.more.iter().map(|(key, value)| (key.clone(), value.clone()));
        Json::Object(own.into_iter().chain(more).collect())
    }

    /// The message that such an object describes.
    pub(super) fn from_json(json: &Json) -> Self {
        let text = |key: &str| json[key].as_str().unwrap_or_default();
        let mut message = Self::new(text("role"), text("content"));
        let others = json.as_object().into_iter().flatten();
        let others = others.filter(|(key, _)| !["role", "content"].contains(&key.as_str()));
        message.more.extend(others.map(|(key, value)| (key.clone(), value.clone())));
        message
    }
}

/// What a template is to write.
#[derive(Debug, Clone, Copy)]
pub struct Chat<'c> {
    /// What was said.
    pub messages: &'c [Message],
    /// Functions that the assistant may call, as OpenAI's API describes them.
    pub tools: &'c [Json],
    /// Whether to open the assistant's next message.
    pub add_generation_prompt: bool,
}

impl<'c> Chat<'c> {
    /// A chat without tools.
    pub fn new(messages: &'c [Message], add_generation_prompt: bool) -> Self {
        Self { messages, tools: &[], add_generation_prompt }
    }
}

/// A Jinja chat template, read as Hugging Face reads it.
///
/// It comes from a file of unknown origin, so it can only compute text from its inputs, and its
/// steps and its output are limited; what a single step may do is where
/// [`isolate_chat_templates`](crate::isolate_chat_templates) has been called.
pub struct ChatTemplate {
    source: String,
    bos: String,
    eos: String,
}

impl ChatTemplate {
    /// A template with the texts of the tokens that open and close a text, empty if there are none.
    /// Nothing is read of it yet.
    pub fn new(source: &str, bos: &str, eos: &str) -> Self {
        Self { source: source.to_owned(), bos: bos.to_owned(), eos: eos.to_owned() }
    }

    /// The texts of chats, ready for [`Tokenizer::encode`](crate::Tokenizer::encode). Each is an
    /// error `ChatTemplate` if the template refuses its messages (many allow only alternating
    /// roles), or fails.
    ///
    /// # Errors
    /// `ChatTemplate` if the template is not valid Jinja, or takes more memory or time than a
    /// template may.
    pub fn render_all(&self, chats: &[Chat<'_>]) -> Result<Vec<Result<String>>> {
        let Self { source, bos, eos } = self;
        let template = json!({ "source": source, "bos": bos, "eos": eos });
        render_elsewhere(&template, chats).unwrap_or_else(|| self.render_here(chats))
    }

    /// The text of one chat.
    ///
    /// # Errors
    /// As [`Self::render_all`].
    pub fn render(&self, chat: Chat<'_>) -> Result<String> {
        let mut texts = self.render_all(&[chat])?;
        texts.pop().expect("a text for a chat")
    }

    /// [`Self::render_all`] in this process.
    pub(super) fn render_here(&self, chats: &[Chat<'_>]) -> Result<Vec<Result<String>>> {
        let environment = environment();
        let source = without_generation_blocks(&self.source);
        let template = environment
            .template_from_str(&source)
            .map_err(|error| RuntimeError::chat_template("be read", error))?;
        Ok(chats.iter().map(|chat| self.render_with(&template, chat)).collect())
    }

    fn render_with(&self, template: &Template<'_, '_>, chat: &Chat<'_>) -> Result<String> {
        // Templates ask for `tools is not none`, which an absent name would pass.
        let tools = (!chat.tools.is_empty()).then(|| Value::from(Serde(chat.tools)));
        let messages = chat.messages.iter().map(|message| Value::from(Serde(message.to_json())));
        let inputs = context! {
            messages => messages.collect::<Vec<_>>(),
            add_generation_prompt => chat.add_generation_prompt,
            bos_token => self.bos.as_str(),
            eos_token => self.eos.as_str(),
            tools => tools,
            documents => (),
        };
        let mut output = LimitedOutput(Vec::new());
        template
            .render_captured_to(inputs, &mut output)
            .map_err(|error| RuntimeError::chat_template("be rendered", error))?;
        Ok(String::from_utf8(output.0).expect("minijinja writes whole strings"))
    }
}

/// Jinja as `transformers` sets it up in `utils/chat_template_utils.py`.
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    let mut syntax = SyntaxConfig::builder();
    syntax.trim_blocks(true).lstrip_blocks(true);
    environment
        .set_syntax(syntax.build().expect("only whitespace options differ from the default"));
    environment.set_fuel(Some(FUEL));
    environment.set_recursion_limit(RECURSION_LIMIT);
    environment.set_unknown_method_callback(unknown_method_callback);
    environment.add_filter("tojson", to_json);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

/// Refuses to grow over [`OUTPUT_LIMIT_BYTES`].
struct LimitedOutput(Vec<u8>);

impl io::Write for LimitedOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > OUTPUT_LIMIT_BYTES {
            return Err(io::Error::other(format!("the text passes {OUTPUT_LIMIT_BYTES} bytes")));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::isolation::reason;
    use super::*;
    use std::error::Error as _;

    /// `chat_template.jinja` of the golden models.
    const CHAT_ML: &str = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

    /// `tokenizer.chat_template` of SmolLM2-135M-Instruct.
    const SMOL: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

    /// The shape of Llama 3's template.
    const LLAMA_3: &str = "{{- bos_token }}
{%- if tools is not none %}
    {{- 'tools: ' + tools | tojson }}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{{- 'Today Date: ' + strftime_now('%Y')[:1] + '\\n\\n' + system_message + '<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
";

    /// The shape of Mistral's template.
    const MISTRAL: &str = "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ message['content'].strip() + eos_token }}{% endif %}{% endfor %}";

    fn render(source: &str, chat: &[(&str, &str)]) -> Result<String> {
        let messages: Vec<_> = chat.iter().map(|(role, text)| Message::new(*role, *text)).collect();
        ChatTemplate::new(source, "<s>", "</s>").render(Chat::new(&messages, true))
    }

    /// The engine's sentence for a template that must fail.
    fn refusal(source: &str) -> String {
        let error = render(source, &[("user", "hi")]).unwrap_err();
        assert!(matches!(error, RuntimeError::ChatTemplate { .. }));
        reason(&error)
    }

    #[test]
    fn chat_ml_renders() {
        let text = render(CHAT_ML, &[("system", "Be brief."), ("user", "2 < 3 & 'x'?")]).unwrap();
        assert_eq!(
            text,
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2 < 3 & 'x'?<|im_end|>\n<|im_start|>assistant\n"
        );
    }

    #[test]
    fn generation_prompt_is_the_callers_choice() {
        let template = ChatTemplate::new(CHAT_ML, "", "");
        let text = template.render(Chat::new(&[Message::new("user", "hi")], false)).unwrap();
        assert_eq!(text, "<|im_start|>user\nhi<|im_end|>\n");
    }

    #[test]
    fn smol_adds_its_system_message() {
        let text = render(SMOL, &[("user", "hi")]).unwrap();
        assert_eq!(
            text,
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        );
    }

    #[test]
    fn llama_3_shape_renders() {
        let text = render(LLAMA_3, &[("system", " Be brief. "), ("user", "hi\n")]).unwrap();
        assert_eq!(
            text,
            "<s><|start_header_id|>system<|end_header_id|>\n\nToday Date: 2\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        );
    }

    #[test]
    fn mistral_shape_renders_and_raises() {
        let chat = [("user", "hi"), ("assistant", " Hello "), ("user", "bye")];
        assert_eq!(
            render(MISTRAL, &chat).unwrap(),
            "<s>[INST] hi [/INST]Hello</s>[INST] bye [/INST]"
        );
        let error = render(MISTRAL, &[("assistant", "hi")]).unwrap_err();
        assert_eq!(error.to_string(), "chat template: cannot be rendered");
        let reason = error.source().unwrap().to_string();
        assert!(reason.contains("Conversation roles must alternate"), "{reason}");
    }

    #[test]
    fn blocks_are_trimmed_as_hugging_face_does() {
        let source = "{% for m in messages %}\n    {% if true %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}\n";
        assert_eq!(render(source, &[("user", "a"), ("user", "b")]).unwrap(), "a\nb\n");
    }

    #[test]
    fn generation_block_renders_its_content() {
        let source = "{% for m in messages %}\n{%- generation %}\n[{{ m.content }}]\n{% endgeneration -%}\n{% endfor %}";
        assert_eq!(render(source, &[("user", "a"), ("user", "b")]).unwrap(), "[a]\n[b]\n");
        let scoped =
            "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}";
        assert_eq!(render(scoped, &[]).unwrap(), "21");
    }

    #[test]
    fn tools_and_what_else_a_message_has_are_read() {
        let source = "{% for t in tools %}{{ t.function.name }};{% endfor %}\
                      {% for m in messages %}{{ m.name }}{{ m.tool_calls | tojson }}{% endfor %}";
        let mut message = Message::new("assistant", "");
        message.more.insert("tool_calls".to_owned(), json!([{"id": 1}]));
        assert_eq!(Message::from_json(&message.to_json()), message);
        let tools = [json!({"type": "function", "function": {"name": "now"}})];
        let chat = Chat { tools: &tools, ..Chat::new(std::slice::from_ref(&message), true) };
        let text = ChatTemplate::new(source, "", "").render(chat).unwrap();
        assert_eq!(text, "now;[{\"id\": 1}]");
    }

    #[test]
    fn loop_controls_work() {
        let source = "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% break %}{% endfor %}";
        assert_eq!(render(source, &[("user", "a"), ("user", "b"), ("user", "c")]).unwrap(), "b");
    }

    #[test]
    fn template_with_broken_syntax_is_refused() {
        let error = ChatTemplate::new("{% for m in %}", "", "").render_all(&[]).err().unwrap();
        assert_eq!(error.to_string(), "chat template: cannot be read");
        assert!(error.source().unwrap().to_string().contains("syntax error"));
    }

    #[test]
    fn hostile_templates_are_refused() {
        let endless =
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
        assert!(refusal(endless).contains("ran out of fuel"));
        let recursive = "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}";
        assert!(refusal(recursive).contains("recursion limit"), "{}", refusal(recursive));
        let wide = "{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}";
        assert!(refusal(wide).contains("passes 16777216 bytes"), "{}", refusal(wide));
        let file = "{% include '/etc/passwd' %}";
        assert!(refusal(file).contains("non-existing template"), "{}", refusal(file));
        assert!(refusal("{{ messages.__class__.__base__.x }}").contains("undefined"));
    }
}
