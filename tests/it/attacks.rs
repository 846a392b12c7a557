//! Files that hurt: they end in a sentence, soon, and with little memory.

use std::{
    fs::{self, File},
    io::Write,
    os::unix::fs::symlink,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::{
    command::{Answer, Dir, arg, fail, slimllm, succeed, tiny_model},
    sources::copy_folder,
};

/// A template has a second of a processor; the rest is for machines that are busy.
const SOON: Duration = Duration::from_secs(30);

/// A tiny model whose files a test may change.
fn changed_model(change: impl FnOnce(&Dir)) -> Dir {
    let dir = Dir::new();
    copy_folder(&tiny_model("llama"), dir.root());
    change(&dir);
    dir
}

/// What a chat answers to one message; the command may use 2 GiB of addresses, itself included.
fn chat(model: &Dir) -> Answer {
    let script = "ulimit -v 2097152; echo hi | \"$@\"";
    let mut shell = Command::new("sh");
    shell.args(["-c", script, "sh", env!("CARGO_BIN_EXE_slimllm")]);
    Answer::of(shell.args(["run", &arg(model.root()), "--chat", "-n", "1", "--device", "cpu"]))
}

#[test]
fn templates_that_take_memory_stack_or_time_end_in_a_sentence() {
    let long = |part: &str| format!("{{{{ {}1 }}}}", part.repeat(40_000));
    let doubled = |start: &str, sum: &str| {
        format!(
            "{{% set ns = namespace(x={start}) %}}{{% for i in range(40) %}}{{% set ns.x = {sum} %}}\
             {{% endfor %}}{{{{ ns.x | length }}}}"
        )
    };
    for template in [
        // Deep where it is read, and where it is run.
        long("-"),
        long("not "),
        format!("{{{{ messages{} }}}}", ".a".repeat(40_000)),
        format!("{{{{ {}{} }}}}", "[".repeat(40_000), "]".repeat(40_000)),
        "{% set n = namespace() %}{% set n.x = n %}{{ n }}".into(),
        "{% set n = namespace(x=1) %}{% set n.x = [n] %}{{ n.x }}".into(),
        "{% set a = namespace() %}{% set a.x = a %}{% set b = namespace() %}{% set b.x = b %}\
         {{ a == b }}"
            .into(),
        // Memory of one step, and of a few.
        "{{ ('a\nb') | indent(10000000000) }}".into(),
        "{{ '%10000000000d' | format(1) }}".into(),
        "{{ range(10) | batch(99999999999, 0) | list | length }}".into(),
        "{{ range(10) | slice(99999999999) | list | length }}".into(),
        "{% set x = 'a' * 100000 %}{{ x.replace('a', x) | length }}".into(),
        "{% set x = 'a' * 10000000 %}{{ range(10000) | join(x) | length }}".into(),
        "{{ [[1]] | tojson(indent=9223372036854775807) }}".into(),
        doubled("'aaaaaaaa'", "ns.x ~ ns.x"),
        doubled("[1]", "ns.x + ns.x"),
        // Time.
        "{% set x = 'a' * 1000000 %}{% set y = 'a' * 500000 ~ 'b' %}\
         {% for i in range(100000) %}{{ x.find(y) }}{% endfor %}"
            .into(),
    ] {
        let model = changed_model(|dir| drop(dir.write("chat_template.jinja", &template)));
        let start = Instant::now();
        let answer = chat(&model);
        let shown = &template[..template.len().min(80)];
        assert!([0, 2].contains(&answer.code), "{shown}: {} {}", answer.code, answer.stderr);
        assert!(answer.stderr.contains("chat template: cannot be "), "{shown}: {}", answer.stderr);
        assert!(start.elapsed() < SOON, "{shown}: {:?}", start.elapsed());
    }
}

#[test]
fn conversion_ignores_a_template_that_takes_too_much() {
    let template = "{% set n = namespace() %}{% set n.x = n %}{{ n }}";
    let model = changed_model(|dir| drop(dir.write("chat_template.jinja", template)));
    let out = model.arg("out.gguf");
    succeed(&["convert", &arg(model.root()), "-o", &out, "--method", "rtn", "--quiet"]);
    assert!(succeed(&["inspect", &out, "--metadata"]).stdout.contains("n.x = n"));
}

#[test]
fn renderer_reads_a_request_and_answers_it() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_slimllm"))
        .arg("render-template")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let chat = json!({ "messages": [{ "role": "user", "content": "hi" }] });
    let template = json!({ "source": "{{ bos_token }}{{ messages[0].content }}", "bos": "<s>" });
    let request = json!({ "template": template, "chats": [chat] }).to_string();
    child.stdin.take().unwrap().write_all(request.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(answer, json!({ "texts": [{ "text": "<s>hi" }] }));
}

#[test]
fn tokenizers_that_make_the_library_fail_end_in_a_sentence() {
    let ten = json!({ "type": "Replace", "pattern": { "Regex": "." }, "content": "aaaaaaaaaa" });
    let empty = json!({ "type": "Replace", "pattern": { "String": "" }, "content": "xx" });
    let nothing = json!({ "type": "Replace", "pattern": { "Regex": ".*" }, "content": "" });
    let strip = json!({ "type": "Strip", "content": "e", "start": 0, "stop": 1 });
    let charsmap = |text: &str| json!({ "type": "Precompiled", "precompiled_charsmap": text });
    let sequence = |key: &str, parts: &[&Value]| json!({ "type": "Sequence", key: parts });
    for (section, component) in [
        ("pre_tokenizer", json!({ "type": "FixedLength", "length": 0 })),
        ("normalizer", charsmap("/P///w==")),
        ("normalizer", charsmap("AAAAAA==")),
        ("normalizer", empty),
        ("normalizer", sequence("normalizers", &[&ten; 10])),
        ("decoder", sequence("decoders", &[&ten; 10])),
        ("decoder", sequence("decoders", &[&nothing, &strip])),
    ] {
        let model = changed_model(|dir| {
            let path = dir.path("tokenizer.json");
            let mut tokenizer: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
            tokenizer[section] = component.clone();
            fs::write(path, tokenizer.to_string()).unwrap();
        });
        let model = arg(model.root());
        let answer = slimllm(&["run", &model, "-p", "hello there", "-n", "2", "--device", "cpu"]);
        assert_eq!(answer.code, 2, "{component}: {}", answer.stderr);
        assert!(answer.stderr.contains("tokenizer: "), "{component}: {}", answer.stderr);
    }
}

/// A tiny model with something else in the place of one of its files.
fn replaced(name: &str, make: impl FnOnce(&Path)) -> Dir {
    changed_model(|dir| {
        let path = dir.path(name);
        let _ = fs::remove_file(&path);
        make(&path);
    })
}

fn link_to(target: &str) -> impl FnOnce(&Path) {
    move |path| symlink(target, path).unwrap()
}

fn pipe(path: &Path) {
    assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
}

#[test]
fn links_out_of_a_model_and_special_files_are_refused() {
    for (name, make, fragment) in [
        (
            "chat_template.jinja",
            Box::new(link_to("/proc/self/environ")) as Box<dyn FnOnce(&Path)>,
            "a link that leads out of the model",
        ),
        (
            "chat_template.jinja",
            Box::new(link_to("/etc/passwd")),
            "a link that leads out of the model",
        ),
        ("chat_template.jinja", Box::new(link_to("/dev/zero")), "not a regular file"),
        ("tokenizer.json", Box::new(pipe), "not a regular file"),
        ("config.json", Box::new(pipe), "not a regular file"),
        ("model.safetensors", Box::new(pipe), "not a regular file"),
    ] {
        let model = replaced(name, make);
        let source = arg(model.root());
        let out = model.arg("out.gguf");
        for args in [
            &["convert", &source, "-o", &out, "--method", "rtn", "--quiet"][..],
            &["run", &source, "-p", "hi", "-n", "1", "--device", "cpu"],
        ] {
            fail(args, &[name, fragment]);
        }
    }
    let dir = Dir::new();
    pipe(&dir.path("model.gguf"));
    for args in
        [&["inspect", &dir.arg("model.gguf")][..], &["run", &dir.arg("model.gguf"), "-p", "hi"]]
    {
        fail(args, &["model.gguf", "not a regular file"]);
    }
}

/// The layout of the hub's cache: files are links to what they hold.
#[test]
fn links_into_the_hub_cache_are_followed() {
    let dir = Dir::new();
    let (blobs, snapshot) = (dir.path("blobs"), dir.path("snapshots/main"));
    fs::create_dir_all(&blobs).unwrap();
    fs::create_dir_all(&snapshot).unwrap();
    for entry in fs::read_dir(tiny_model("llama")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap();
        fs::copy(&path, blobs.join(name)).unwrap();
        symlink(Path::new("../../blobs").join(name), snapshot.join(name)).unwrap();
    }
    succeed(&["run", &arg(&snapshot), "-p", "hi", "-n", "1", "--device", "cpu"]);
}

/// The cache of a text is refused where it would take more than the machine has.
#[test]
fn context_that_no_memory_holds_is_refused() {
    let model = changed_model(|dir| {
        let path = dir.path("config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        config["max_position_embeddings"] = json!(1 << 30);
        fs::write(path, config.to_string()).unwrap();
    });
    let source = arg(model.root());
    let context = &(1 << 30).to_string();
    let args = ["run", &source, "-p", "hi", "-n", "1", "--device", "cpu", "--context", context];
    fail(&args, &["context: found 1073741824 tokens, which take", "are free"]);
    succeed(&["run", &source, "-p", "hi", "-n", "1", "--device", "cpu"]);
}

#[test]
fn file_that_is_shortened_while_it_is_read_ends_in_a_sentence() {
    let model = changed_model(|_| ());
    let out = Dir::new();
    let source = arg(model.root());
    let mut child = out
        .slimllm("convert")
        .args([&source, "-o", "out.gguf", "--samples", "4096", "--context", "512"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    while out.names().is_empty() {
        assert!(child.try_wait().unwrap().is_none());
        std::thread::sleep(Duration::from_millis(5));
    }
    File::options().write(true).open(model.path("model.safetensors")).unwrap().set_len(0).unwrap();
    let output = child.wait_with_output().unwrap();
    let talk = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{talk}");
    assert!(talk.contains("was shortened while it was read"), "{talk}");
    assert!(talk.contains("if there is a folder `out.gguf.work`"), "{talk}");
}
