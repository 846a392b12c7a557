//! `run`: where prompts come from, how text is drawn, and the chat, piped and on a terminal.

use std::{
    fs,
    process::{Command, Stdio},
    time::Duration,
};

use rexpect::session::{Options, PtySession, spawn_with_options};
use serde_json::{Value, json};

use crate::command::{Answer, Dir, arg, command, fail, succeed, tiny_model};

/// Long enough for a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

fn tiny() -> String {
    arg(&tiny_model("llama"))
}

/// The tiny model in a folder of its own, with other values of keys of one of its files.
fn tiny_with(file: &str, changes: Value) -> Dir {
    let dir = Dir::new();
    for entry in fs::read_dir(tiny_model("llama")).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, dir.root().join(path.file_name().unwrap())).unwrap();
    }
    let mut json: Value = serde_json::from_slice(&fs::read(dir.path(file)).unwrap()).unwrap();
    json.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    dir.write(file, json.to_string());
    dir
}

/// Runs a command with this on stdin.
fn piped(command: &mut Command, input: &str) -> Answer {
    let dir = Dir::new();
    let input = fs::File::open(dir.write("input", input)).unwrap();
    Answer::of(command.stdin(Stdio::from(input)))
}

/// A chat with the tiny model whose messages come from a pipe.
fn piped_chat(flags: &[&str], input: &str) -> Answer {
    let chat = ["run", &tiny(), "--chat", "-n", "4", "--temperature", "0"];
    piped(command(&chat).args(flags), input).succeeds()
}

/// A chat on a terminal, up to its first prompt.
fn chat_on_terminal(home: &Dir, args: &[&str]) -> PtySession {
    let mut chat = command(&["run"]);
    chat.args(args).args(["--chat", "--temperature", "0", "--device", "cpu"]);
    chat.env("XDG_STATE_HOME", home.path("state")).env("TERM", "xterm");
    let options =
        Options::new().timeout_ms(Some(PATIENCE.as_millis() as u64)).strip_ansi_escape_codes(true);
    let mut session = spawn_with_options(chat, options).unwrap();
    session.exp_string("/help lists the commands").unwrap();
    session.exp_string("> ").unwrap();
    session
}

/// Sends keys, which need no line break.
fn press(session: &mut PtySession, keys: &str) {
    session.send(keys).unwrap();
    session.flush().unwrap();
}

/// What `/save` wrote: role and content of each message.
fn saved(dir: &Dir, name: &str) -> Vec<(String, String)> {
    let json: Value = serde_json::from_slice(&fs::read(dir.path(name)).unwrap()).unwrap();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let messages = json["messages"].as_array().unwrap();
    messages.iter().map(|message| (text(&message["role"]), text(&message["content"]))).collect()
}

/// The seed that a run told.
fn seed(answer: &Answer) -> &str {
    let (_, seed) = answer.stderr.split_once("; seed ").expect("the seed is told");
    seed.lines().next().unwrap()
}

#[test]
fn seed_is_random_and_told_and_repeats_the_text() {
    let run = ["run", &tiny(), "-p", "The fox", "-n", "24", "--temperature", "2", "--top-k", "0"];
    let (first, second) = (succeed(&run), succeed(&run));
    assert_ne!(seed(&first), seed(&second));
    assert_ne!(first.stdout, second.stdout);
    let again = succeed(&[&run[..], &["--seed", seed(&first)]].concat());
    assert_eq!(again.stdout, first.stdout);
    assert_eq!(seed(&again), seed(&first));
}

#[test]
fn flags_win_over_the_models_settings_which_win_over_ours() {
    let dir = tiny_with("generation_config.json", json!({"temperature": 0.25, "top_k": 7}));
    let (folder, slim) = (&arg(dir.root()), &dir.arg("tiny.slim.gguf"));
    succeed(&["convert", folder, "-o", slim, "--method", "rtn", "--quiet"]);
    for model in [folder, slim] {
        let told = |flags: &[&str]| {
            succeed(&[&["run", model, "-p", "a", "-n", "1"], flags].concat()).stderr
        };
        let plain = told(&[]);
        let expected = "sampling: temperature 0.25 (the model's), top-k 7 (the model's), top-p 0.";
        assert!(plain.contains(expected), "{plain}");
        let given = told(&["--temperature", "0.5", "--min-p", "0.2"]);
        for expected in ["temperature 0.5 (given), top-k 7 (the model's)", "min-p 0.2 (given)"] {
            assert!(given.contains(expected), "{given}");
        }
    }
}

#[test]
fn model_that_does_not_draw_is_greedy() {
    let settings = json!({"do_sample": false, "temperature": 0.9, "top_p": 0.9});
    let dir = tiny_with("generation_config.json", settings);
    let run = |model: &str, flags: &[&str]| {
        succeed(&[&["run", model, "-p", "The fox", "-n", "12"], flags].concat()).stdout
    };
    assert_eq!(run(&arg(dir.root()), &[]), run(&tiny(), &["--temperature", "0"]));
}

#[test]
fn settings_that_make_no_sense_are_refused_by_their_key() {
    for (key, value) in [("temperature", json!("hot")), ("top_p", json!(7)), ("top_k", json!(0.5))]
    {
        let dir = tiny_with("generation_config.json", json!({key: value}));
        let place = format!("generation_config.json`: key `{key}`: found {value}, expected ");
        fail(&["run", &arg(dir.root()), "-p", "a"], &[&place]);
    }
}

#[test]
fn prompt_comes_from_stdin_and_from_files() {
    let dir = Dir::new();
    let file = &dir.write("prompt", "The fox\nand the\n");
    let run = ["run", &tiny(), "-n", "8", "--temperature", "0"];
    let expected = succeed(&[&run[..], &["-p", "The fox\nand the"]].concat()).stdout;
    let from_file = succeed(&[&run[..], &["--prompt-file", file]].concat()).stdout;
    let from_stdin = piped(command(&run).args(["-p", "-"]), "The fox\nand the\n").succeeds().stdout;
    assert_eq!([from_file, from_stdin], [expected.clone(), expected]);
    fail(&[&run[..], &["-p", "a", "--prompt-file", file]].concat(), &["cannot be used with"]);
    fail(&[&run[..], &["--prompt-file", &dir.arg("none")]].concat(), &["none`: cannot read"]);
    fail(&run, &["--prompt"]);
}

#[test]
fn prompt_of_any_size_is_read_and_counted() {
    let long = "word ".repeat(40 << 10);
    let answer = piped(&mut command(&["run", &tiny(), "-p", "-"]), &long);
    answer.fails(&["the prompt has ", "but the context holds 512", "made for no longer texts"]);
    let dir = Dir::new();
    let file = &dir.write("prompt", &long);
    let run = ["run", &tiny(), "--prompt-file", file, "--context", "64"];
    fail(&run, &["but the context holds 64", "raise `--context`, up to 512"]);
}

#[test]
fn prompt_that_is_empty_starts_a_text() {
    let answer = succeed(&["run", &tiny(), "-p", "", "-n", "4", "--temperature", "0"]);
    assert!(answer.stdout.len() > 1, "{:?}", answer.stdout);
    let no_bos = json!({"bos_token_id": null});
    let dir = tiny_with("generation_config.json", no_bos.clone());
    let config: Value =
        serde_json::from_slice(&fs::read(dir.path("config.json")).unwrap()).unwrap();
    let mut config = config.as_object().unwrap().clone();
    config.extend(no_bos.as_object().unwrap().clone());
    dir.write("config.json", Value::Object(config).to_string());
    dir.write("tokenizer_config.json", "{}");
    let run = ["run", &arg(dir.root()), "-p", ""];
    fail(&run, &["the prompt is empty, and the model has no token that starts a text"]);
}

#[test]
fn token_limit_of_minus_one_ends_with_the_context() {
    let run = ["run", &tiny(), "-p", "a", "--temperature", "0", "--context", "40"];
    let all = succeed(&[&run[..], &["-n", "-1"]].concat());
    assert!(all.stderr.contains("stopped: the context of 40 tokens is full"), "{}", all.stderr);
    let some = succeed(&[&run[..], &["-n", "5"]].concat());
    assert!(some.stderr.contains("stopped: 5 tokens (`-n`"), "{}", some.stderr);
    assert!(all.stdout.starts_with(some.stdout.trim_end_matches('\n')));
    let none = succeed(&[&run[..], &["-n", "0"]].concat());
    assert_eq!(none.stdout, "\n");
}

#[test]
fn habits_from_llama_cpp_are_answered() {
    let run = ["run", &tiny(), "-p", "a"];
    let with = |more: &[&str], sentence: &str| fail(&[&run[..], more].concat(), &[sentence]);
    with(&["-ngl", "99"], "the number of blocks on the GPU is `--gpu-layers N`");
    with(&["-cnv"], "a chat is `--chat`");
    with(&["-sys", "Be brief."], "the system prompt is `--system TEXT`");
    fail(&["run", "-m", &tiny(), "-p", "a"], &["the model has no flag"]);
    with(&["-n", "-2"], "expected a whole number, or -1 for no limit");
    succeed(&[&run[..], &["-c", "32", "-t", "1", "-s", "5", "--temp", "0.5", "-n", "1"]].concat());
}

#[test]
fn chat_obeys_commands_and_sends_what_follows_two_slashes() {
    let dir = Dir::new();
    let (first, second) = (dir.arg("first.json"), dir.arg("second.json"));
    let input = format!(
        "/system Be brief.\nHello\n/nonsense now\n//etc\n/stats\n/save {first}\n/save {first}\n\
         /save\n/reset\nAgain\n/save {second}\n/system\n/help\n/exit\nNever read\n"
    );
    let answer = piped_chat(&[], &input);
    for sentence in [
        "the system prompt is set",
        "there is no command `/nonsense`; `/help` lists them",
        "2 turns, 0 of them dropped",
        "cannot save the conversation: File exists",
        "`/save` takes the name of a new file",
        "the conversation starts anew",
        "the system prompt is: Be brief.",
        "/stats         show",
    ] {
        assert!(answer.stderr.contains(sentence), "no `{sentence}` in\n{}", answer.stderr);
    }
    assert_eq!(answer.stderr.matches("prefill").count(), 3 + 1, "{}", answer.stderr);
    let of = |messages: Vec<(String, String)>| -> Vec<String> {
        let is_answer = |role: &str| role == "assistant";
        let shown = |(role, content): (String, String)| {
            if is_answer(&role) { role } else { format!("{role}: {content}") }
        };
        messages.into_iter().map(shown).collect()
    };
    let expected = ["system: Be brief.", "user: Hello", "assistant", "user: /etc", "assistant"];
    assert_eq!(of(saved(&dir, "first.json")), expected);
    assert_eq!(of(saved(&dir, "second.json")), ["system: Be brief.", "user: Again", "assistant"]);
}

#[test]
fn chat_takes_its_system_prompt_and_first_message_from_flags() {
    let plain = piped_chat(&["-p", "Hello"], "");
    let with_system = piped_chat(&["-p", "Hello", "--system", "Be brief."], "");
    assert_eq!(piped_chat(&[], "Hello\n").stdout, plain.stdout);
    assert_eq!(piped_chat(&["-p", "-"], "Hello\n").stdout, plain.stdout);
    assert_eq!(piped_chat(&["-p", ""], "Hello\n").stdout, plain.stdout);
    assert_eq!(piped_chat(&[], "/system Be brief.\nHello\n").stdout, with_system.stdout);
    let prefill = |answer: &Answer| answer.stderr.lines().last().unwrap().to_owned();
    assert_ne!(prefill(&plain), prefill(&with_system));
    fail(&["run", &tiny(), "-p", "a", "--system", "b"], &["--chat"]);
}

#[test]
fn chat_refuses_a_system_prompt_that_the_template_leaves_out() {
    let dir = tiny_with("config.json", json!({}));
    let template =
        "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}";
    dir.write("chat_template.jinja", template);
    let run = ["run", &arg(dir.root()), "--chat", "-p", "a", "-n", "1", "--system", "Be brief."];
    fail(&run, &["the model takes no system prompt: its chat template leaves it out"]);
}

#[test]
fn chat_drops_the_oldest_turns_of_a_full_context() {
    let dir = Dir::new();
    let save = dir.arg("all.json");
    let input = format!("{}/stats\n/save {save}\n", "Tell me of the fox\n".repeat(8));
    let answer = piped_chat(&["--context", "256", "--system", "Be brief."], &input);
    let dropped =
        "the context of 256 tokens is full: dropped the oldest 1 turn of the conversation";
    assert!(answer.stderr.contains(dropped), "{}", answer.stderr);
    assert!(answer.stderr.contains("8 turns, "), "{}", answer.stderr);
    assert!(!answer.stderr.contains("8 turns, 0 of them"), "{}", answer.stderr);
    assert_eq!(saved(&dir, "all.json").len(), 1 + 2 * 8, "what is dropped is saved");
}

#[test]
fn chat_refuses_a_message_longer_than_the_context_and_goes_on() {
    let long = "word ".repeat(1000);
    let answer = piped_chat(&[], &format!("Hello\n{long}\nAnd you?\n/stats\n"));
    let sentence = "the message is too long: with it alone the chat has ";
    assert!(answer.stderr.contains(sentence), "{}", answer.stderr);
    assert!(answer.stderr.contains("2 turns, 0 of them dropped"), "{}", answer.stderr);
}

#[test]
fn chat_computes_only_what_is_new() {
    let answer = piped_chat(&[], "Hello\nAnd you?\nAnd they?\n");
    let prefilled: Vec<usize> = answer
        .stderr
        .lines()
        .filter_map(|line| line.strip_prefix("prefill ")?.split(' ').next()?.parse().ok())
        .collect();
    let whole = piped_chat(&[], "Hello\n").stderr;
    assert_eq!(prefilled.len(), 3, "{whole}");
    // All that was said before is several times as long.
    assert!(prefilled[2] < 2 * prefilled[0], "{prefilled:?}");
}

#[test]
fn chat_on_a_terminal_keeps_a_history() {
    let home = Dir::new();
    let mut chat = chat_on_terminal(&home, &[&tiny(), "-n", "2"]);
    chat.send_line("/reset").unwrap();
    chat.exp_string("the conversation starts anew").unwrap();
    chat.exp_string("> ").unwrap();
    chat.send_line("/unknown").unwrap();
    chat.exp_string("there is no command `/unknown`").unwrap();
    chat.exp_string("> ").unwrap();
    // Up, up, return.
    press(&mut chat, "\u{1b}[A\u{1b}[A\r");
    chat.exp_string("the conversation starts anew").unwrap();
    chat.exp_string("> ").unwrap();
    // To the front, insert a slash's worth of text: the line is edited, not sent raw.
    press(&mut chat, "help\u{1}/\u{5}\r");
    chat.exp_string("/save FILE").unwrap();
    chat.exp_string("> ").unwrap();
    press(&mut chat, "\u{4}");
    chat.exp_eof().unwrap();

    let mut chat = chat_on_terminal(&home, &[&tiny(), "-n", "2"]);
    press(&mut chat, "\u{1b}[A\r");
    chat.exp_string("/save FILE").unwrap();
    chat.exp_string("> ").unwrap();
    press(&mut chat, "\u{4}");
    chat.exp_eof().unwrap();
}

#[test]
fn chat_on_a_terminal_takes_a_paste_whole() {
    let home = Dir::new();
    let mut chat = chat_on_terminal(&home, &[&tiny(), "-n", "2"]);
    press(&mut chat, "\u{1b}[200~one\ntwo\u{1b}[201~");
    press(&mut chat, "\r");
    chat.exp_string("prefill").unwrap();
    chat.exp_string("> ").unwrap();
    chat.send_line(&format!("/save {}", home.arg("chat.json"))).unwrap();
    chat.exp_string("saved to").unwrap();
    assert_eq!(saved(&home, "chat.json")[0], ("user".to_owned(), "one\ntwo".to_owned()));
}

#[test]
fn chat_on_a_terminal_stops_an_answer_at_ctrl_c_and_goes_on() {
    let home = Dir::new();
    let endless =
        tiny_with("config.json", json!({"max_position_embeddings": 1 << 20, "eos_token_id": null}));
    // Without any token that is known to end a turn or a text.
    for file in ["generation_config.json", "tokenizer_config.json"] {
        endless.write(file, "{}");
    }
    let tokenizer = fs::read_to_string(endless.path("tokenizer.json")).unwrap();
    endless.write("tokenizer.json", tokenizer.replace("</s>", "<a>").replace("<|im_end|>", "<b>"));
    let model = arg(endless.root());
    let args = [model.as_str(), "-n", "-1", "--context", "100000", "--threads", "1"];
    let mut chat = chat_on_terminal(&home, &args);
    chat.send_line("Hello").unwrap();
    std::thread::sleep(Duration::from_secs(1));
    chat.send_control('c').unwrap();
    chat.exp_string("stopped: Ctrl-C").unwrap();
    chat.exp_string("> ").unwrap();
    chat.send_line("/stats").unwrap();
    chat.exp_string("1 turn, 0 of them dropped").unwrap();
    chat.exp_string("> ").unwrap();
    chat.send_line(&format!("/save {}", home.arg("chat.json"))).unwrap();
    chat.exp_string("saved to").unwrap();
    chat.exp_string("> ").unwrap();
    assert!(!saved(&home, "chat.json")[1].1.is_empty(), "the partial answer is kept");
    // At the prompt, it takes two.
    chat.send_control('c').unwrap();
    chat.exp_string("press Ctrl-C again or Ctrl-D to leave").unwrap();
    chat.exp_string("> ").unwrap();
    chat.send_control('c').unwrap();
    chat.exp_eof().unwrap();
}
