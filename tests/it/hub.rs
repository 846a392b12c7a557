//! Models from a hub: the right files, or a sentence, whatever its server does.

mod stand_in;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::mpsc,
    time::Duration,
};

use rexpect::{
    process::WaitStatus,
    session::{Options, spawn_with_options},
};

use self::stand_in::{COMMIT, Reply, Repository, Request, StandIn, git_hash, sha256};
use crate::command::{Answer, Dir, arg, command, fail, succeed, test_data, tiny_model};

const WEIGHTS: &str = "model.safetensors";

/// A tiny model and what else repositories have.
fn repository() -> Repository {
    let mut repository = Repository::of(&tiny_model("llama"));
    repository.files.remove("expected.safetensors");
    for name in ["pytorch_model.bin", "README.md", "onnx/model.onnx", "consolidated.safetensors"] {
        repository.add(name, "not needed");
    }
    repository
}

/// A hub that does what hubs do, but for what a test has in mind.
fn hub(fault: impl Fn(&Request, usize) -> Option<Reply> + Send + Sync + 'static) -> StandIn {
    let repository = repository();
    StandIn::start(move |request, before| {
        fault(request, before).unwrap_or_else(|| repository.answer(request))
    })
}

/// The command with a hub, and a cache of its own.
fn with_hub(hub: &StandIn, home: &Dir, args: &[&str]) -> Command {
    let mut command = command(args);
    command.env("HF_ENDPOINT", &hub.address).env("HF_HOME", home.root());
    for name in [
        "HF_HUB_OFFLINE",
        "HF_HUB_CACHE",
        "HF_TOKEN",
        "HF_TOKEN_PATH",
        "HTTP_PROXY",
        "http_proxy",
        "ALL_PROXY",
        "all_proxy",
    ] {
        command.env_remove(name);
    }
    command
}

fn inspect(hub: &StandIn, home: &Dir, id: &str) -> Answer {
    Answer::of(&mut with_hub(hub, home, &["inspect", id, "--json"]))
}

/// Checks that the model was opened, and that its files are those of the repository.
fn is_whole(answer: Answer, home: &Dir) {
    assert_eq!(answer.succeeds().json()["parameters"], 127_296);
    let repository = repository();
    let snapshot = snapshot(home);
    for name in fs::read_dir(&snapshot).unwrap().map(|entry| entry.unwrap().file_name()) {
        let bytes = fs::read(snapshot.join(&name)).unwrap();
        assert!(bytes == repository.files[name.to_str().unwrap()], "{name:?}");
    }
    let left = blobs(home).into_iter().filter(|name| name.contains('.')).collect::<Vec<_>>();
    assert!(left.is_empty(), "{left:?}");
}

fn model_folder(home: &Dir) -> PathBuf {
    home.path("hub/models--org--name")
}

fn snapshot(home: &Dir) -> PathBuf {
    model_folder(home).join("snapshots").join(COMMIT)
}

fn names_in(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten();
    let mut names: Vec<_> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn blobs(home: &Dir) -> Vec<String> {
    names_in(&model_folder(home).join("blobs"))
}

/// Where the weights are until they are whole.
fn incomplete(home: &Dir) -> PathBuf {
    let name = format!("{}.incomplete", sha256(&repository().files[WEIGHTS]));
    let folder = model_folder(home).join("blobs");
    fs::create_dir_all(&folder).unwrap();
    folder.join(name)
}

fn is_of_weights(request: &Request) -> bool {
    request.path.ends_with(&format!("/store/{WEIGHTS}"))
}

#[test]
fn model_is_fetched_once_and_only_what_is_needed() {
    let (hub, home) = (hub(|_, _| None), Dir::new());
    let answer = inspect(&hub, &home, "org/name");
    assert!(answer.stderr.contains("MiB 1 of 1: model.safetensors"), "{}", answer.stderr);
    assert!(
        answer.stderr.contains(&format!("of `org/name`, commit {COMMIT}")),
        "{}",
        answer.stderr
    );
    is_whole(answer, &home);
    let needed = [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        WEIGHTS,
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(names_in(&snapshot(&home)), needed);
    assert_eq!(blobs(&home).len(), needed.len());
    assert_eq!(fs::read_to_string(model_folder(&home).join("refs/main")).unwrap(), COMMIT);
    let config =
        model_folder(&home).join("blobs").join(git_hash(&repository().files["config.json"]));
    assert!(config.is_file());
    // Of the cache, as other programs left it, too.
    let asked = hub.requests().len();
    is_whole(inspect(&hub, &home, "org/name"), &home);
    is_whole(inspect(&hub, &home, &format!("org/name@{COMMIT}")), &home);
    let offline = |id: &str| {
        Answer::of(with_hub(&hub, &home, &["inspect", id, "--json"]).env("HF_HUB_OFFLINE", "1"))
    };
    is_whole(offline("org/name"), &home);
    offline("org/name@v1").fails(&["`org/name@v1`: found neither", "hint: unset `HF_HUB_OFFLINE`"]);
    offline("org/name:Q8_0").fails(&["nor a whole model in the hub's cache"]);
    assert_eq!(hub.requests().len(), asked);
    // What is there is not fetched again for another revision.
    is_whole(inspect(&hub, &home, "org/name@v1"), &home);
    assert_eq!((hub.requests().len(), hub.count("/revision/v1")), (asked + 1, 1));
    inspect(&hub, &home, "org/name@v2").fails(&["no such revision", "hint: check the spelling"]);
}

#[test]
fn cache_opens_where_no_hub_is_reached() {
    let (mut hub, home) = (hub(|_, _| None), Dir::new());
    is_whole(inspect(&hub, &home, "org/name"), &home);
    hub.address = "http://127.0.0.1:9".to_owned();
    is_whole(inspect(&hub, &home, "org/name"), &home);
    let answer = inspect(&hub, &home, "org/other");
    answer.fails(&[
        "`org/other`: there is no such file, and the hub at http://127.0.0.1:9 is not reached",
        "hint: check the spelling, if it is a path; if it is a hub id, the network",
    ]);
    // Nothing is waited for.
    assert!(!answer.stderr.contains("next try"), "{}", answer.stderr);
}

#[test]
fn token_goes_to_the_hub_and_nowhere_else() {
    let repository = repository();
    let served = repository.clone();
    let store = StandIn::start(move |request, _| served.answer(request));
    let repository = Repository { store: store.address.clone(), ..repository };
    let hub = StandIn::start(move |request, _| match request.token.as_deref() {
        Some("Bearer hf_secret") => repository.answer(request),
        _ => Reply::new(401, ""),
    });
    let home = Dir::new();
    inspect(&hub, &home, "org/name").fails(&[
        "there is no such file, and the hub has no such model, or gives it only to those it knows",
        "set `HF_TOKEN`, or log in",
    ]);
    let with_token = |token: &str| {
        Answer::of(with_hub(&hub, &home, &["inspect", "org/name", "--json"]).env("HF_TOKEN", token))
    };
    let answer = with_token("hf_wrong");
    answer.fails(&["status 401", "the token, which is from `HF_TOKEN`"]);
    assert!(!answer.stderr.contains("hf_wrong"));
    with_token("a\nb").fails(&["expected a token of letters"]);
    home.write("token", "hf_secret\n");
    is_whole(inspect(&hub, &home, "org/name"), &home);
    let at_store = store.requests();
    assert!(!at_store.is_empty() && at_store.iter().all(|request| request.token.is_none()));
}

#[test]
fn refusals_are_sentences() {
    for (status, fragments) in [
        (403, ["does not give the model to this user", "a gated model has conditions"]),
        (404, ["there is no such file, and the hub has no such model", "check the spelling"]),
        (418, ["the hub answers with status 418", "error: "]),
    ] {
        let (hub, home) = (hub(move |_, _| Some(Reply::new(status, ""))), Dir::new());
        inspect(&hub, &home, "org/name").fails(&fragments);
        assert_eq!(hub.requests().len(), 1);
    }
    let missing = hub(|request, _| is_of_weights(request).then(|| Reply::new(404, "")));
    inspect(&missing, &Dir::new(), "org/name").fails(&["lists a file that it does not have"]);
}

#[test]
fn busy_hubs_are_waited_for_as_long_as_they_ask() {
    let busy = |status, wait: &'static str| {
        move |_: &Request, before| {
            (before < 1).then(|| Reply::new(status, "").header("Retry-After", wait))
        }
    };
    for status in [429, 500, 503] {
        let (hub, home) = (hub(busy(status, "0")), Dir::new());
        let answer = inspect(&hub, &home, "org/name");
        assert!(answer.stderr.contains("warning: http://127.0.0.1:"), "{}", answer.stderr);
        is_whole(answer, &home);
    }
    inspect(&hub(busy(429, "600")), &Dir::new(), "org/name")
        .fails(&["the server is busy (status 429)", "hint: try again in 600 s"]);
    let always = hub(|_, _| Some(Reply::new(503, "").header("Retry-After", "0")));
    inspect(&always, &Dir::new(), "org/name")
        .fails(&["busy (status 503)", "hint: the same command"]);
    assert_eq!(always.requests().len(), 4);
}

/// Twenty downloads of the weights that go wrong, each in its own way.
#[test]
fn twenty_faults_end_in_the_right_file_or_a_sentence() {
    type Fault = Box<dyn Fn(&Request, usize) -> Option<Reply> + Send + Sync>;
    let bytes = || repository().files[WEIGHTS].clone();
    let wrong = || bytes().iter().map(|byte| byte ^ 1).collect::<Vec<_>>();
    let of_weights = |fault: Fault| -> Fault {
        Box::new(move |request, before| is_of_weights(request).then(|| fault(request, before))?)
    };
    // Cut after so many bytes, so many times.
    let cut = |after: usize, times: usize| {
        let repository = repository();
        of_weights(Box::new(move |request, before| {
            (before < times).then(|| repository.answer(request).cut(after))
        }))
    };
    let whole = |status: u16, body: Vec<u8>, times: usize| {
        of_weights(Box::new(move |_, before| {
            (before < times).then(|| Reply::new(status, body.clone()))
        }))
    };
    let healthy = || -> Fault { Box::new(|_, _| None) };
    let always = usize::MAX;
    let size = bytes().len();
    assert!(size > 200_000, "{size}");
    let redirect = |to: &'static str| {
        of_weights(Box::new(move |_, _| Some(Reply::new(302, "").header("Location", to))))
    };
    let damaged = [&wrong()[..1000], &bytes()[1000..70_000]].concat();
    let longer = [bytes(), vec![0; 1000]].concat();
    let wrong_range: Fault = of_weights(Box::new({
        let bytes = bytes();
        move |request, _| {
            let reply = Reply::new(206, &bytes[..]).header("Content-Range", "bytes 7-9/10");
            (request.from > 0).then_some(reply)
        }
    }));
    // The fault, what an earlier download has left, and the sentence, if it is not the right file.
    let cases: Vec<(Fault, Vec<u8>, Option<&str>)> = vec![
        (cut(0, 1), vec![], None),
        (cut(1, 3), vec![], None),
        (cut(100_000, 1), vec![], None),
        (cut(70_000, always), vec![], None),
        (cut(size - 1, 2), vec![], None),
        (cut(0, always), vec![], Some("the connection was cut after 0 of")),
        (cut(1000, always), vec![], Some("the connection was cut after 4000 of")),
        (healthy(), bytes()[..100_000].to_vec(), None),
        (healthy(), bytes(), None),
        (healthy(), longer.clone(), None),
        (healthy(), damaged, None),
        (healthy(), wrong(), None),
        (cut(70_000, 2), wrong()[..10].to_vec(), None),
        (whole(200, bytes(), always), bytes()[..100_000].to_vec(), None),
        (whole(200, longer, always), vec![], None),
        (whole(200, wrong(), 1), vec![], None),
        (whole(200, wrong(), always), vec![], Some("found sha256")),
        (whole(200, bytes()[..100].to_vec(), always), vec![], Some("the connection was cut")),
        (wrong_range, bytes()[..100].to_vec(), Some("expected the range that was asked for")),
        (redirect("/store/model.safetensors"), vec![], Some("more than 5 redirects")),
    ];
    assert_eq!(cases.len(), 20);
    std::thread::scope(|scope| {
        for (number, (fault, left, sentence)) in cases.into_iter().enumerate() {
            scope.spawn(move || {
                let (hub, home) = (hub(fault), Dir::new());
                if !left.is_empty() {
                    fs::write(incomplete(&home), left).unwrap();
                }
                let answer = inspect(&hub, &home, "org/name");
                println!("{number}: {} {}", answer.code, answer.stderr);
                match sentence {
                    None => is_whole(answer, &home),
                    Some(sentence) => {
                        answer.fails(&[sentence]);
                        // Nothing unfinished or wrong has a name.
                        assert!(!snapshot(&home).join(WEIGHTS).exists());
                        assert!(!incomplete(&home).with_extension("").exists());
                    }
                }
            });
        }
    });
}

#[test]
fn killed_download_goes_on_where_it_was() {
    let (told, hears) = mpsc::channel();
    let bytes = repository().files[WEIGHTS].clone();
    let hub = hub(move |request, before| {
        (is_of_weights(request) && before == 0).then(|| {
            // Most of the file, and then nothing more for a while.
            let _ = told.send(());
            Reply::new(200, bytes.clone()).cut(150_000).stalled()
        })
    });
    let home = Dir::new();
    let mut command = with_hub(&hub, &home, &["inspect", "org/name", "--json"]);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    hears.recv_timeout(Duration::from_secs(60)).unwrap();
    let partial = incomplete(&home);
    while partial.metadata().map_or(0, |found| found.len()) < 150_000 {
        std::thread::sleep(Duration::from_millis(10));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!snapshot(&home).join(WEIGHTS).exists());
    is_whole(inspect(&hub, &home, "org/name"), &home);
    assert_eq!(hub.requests().last().unwrap().from, 150_000);
    assert_eq!(hub.count("/config.json"), 1);
}

#[test]
fn interrupted_download_says_that_it_goes_on() {
    let bytes = repository().files[WEIGHTS].clone();
    let hub = hub(move |request, before| {
        (is_of_weights(request) && before == 0)
            .then(|| Reply::new(200, bytes.clone()).cut(150_000).stalled())
    });
    let home = Dir::new();
    let out = &home.arg("a.slim.gguf");
    let options = Options::new().timeout_ms(Some(60_000)).strip_ansi_escape_codes(true);
    let convert = with_hub(&hub, &home, &["convert", "org/name", "-o", out, "--method", "rtn"]);
    let mut session = spawn_with_options(convert, options).unwrap();
    session.exp_string("MiB 0 of 1").unwrap();
    while incomplete(&home).metadata().map_or(0, |found| found.len()) < 150_000 {
        std::thread::sleep(Duration::from_millis(10));
    }
    session.send_control('c').unwrap();
    session.exp_string("interrupted").unwrap();
    session.exp_string("what is there of `org/name` stays; the same command goes on").unwrap();
    assert!(matches!(session.process().wait(), Ok(WaitStatus::Exited(_, 130))));
    is_whole(inspect(&hub, &home, "org/name"), &home);
    assert_eq!(hub.requests().last().unwrap().from, 150_000);
}

#[test]
fn two_processes_fetch_a_file_once() {
    let (hub, home) = (
        hub(|request, _| {
            std::thread::sleep(Duration::from_millis(if is_of_weights(request) { 500 } else { 0 }));
            None
        }),
        Dir::new(),
    );
    std::thread::scope(|scope| {
        let both = [(); 2].map(|()| scope.spawn(|| inspect(&hub, &home, "org/name")));
        both.into_iter().for_each(|one| is_whole(one.join().unwrap(), &home));
    });
    assert_eq!(hub.count(&format!("/store/{WEIGHTS}")), 1);
}

#[test]
fn hostile_lists_are_sentences() {
    let listing = |body: String| {
        hub(move |request, _| {
            request.path.starts_with("/api/").then(|| Reply::new(200, body.clone()))
        })
    };
    let of_file = |name: &str| {
        let mut listing = repository().listing();
        listing["siblings"][0]["rfilename"] = name.into();
        listing.to_string()
    };
    let of_commit = |commit: &str| {
        let mut listing = repository().listing();
        listing["sha"] = commit.into();
        listing.to_string()
    };
    for (body, fragment) in [
        (
            of_file("../../config.json"),
            "a file called `../../config.json`, expected a relative name",
        ),
        (of_file("/etc/passwd"), "expected a relative name"),
        (of_file("a\u{1b}[31m"), "a file called `a\\u{1b}[31m`"),
        (of_commit("../../../x"), "the commit `../../../x`"),
        ("<html>".to_owned(), "expected a list of a repository's files"),
        ("[".repeat(1 << 20), "expected a list of a repository's files"),
        (" ".repeat((32 << 20) + 1), "expected a shorter list"),
    ] {
        let home = Dir::new();
        inspect(&listing(body), &home, "org/name").fails(&[fragment]);
        assert!(!model_folder(&home).exists());
    }
}

#[test]
fn shards_are_those_that_the_index_names() {
    let served = |file: &str| {
        let mut repository = repository();
        let weights = repository.files.remove(WEIGHTS).unwrap();
        repository.add("model-00001-of-00001.safetensors", weights);
        let index = format!(r#"{{"weight_map": {{"a": "{file}"}}}}"#);
        repository.add("model.safetensors.index.json", index);
        StandIn::start(move |request, _| repository.answer(request))
    };
    let home = Dir::new();
    let hub = served("model-00001-of-00001.safetensors");
    // The model's folder is whole; whether its index is right is said when it is opened.
    inspect(&hub, &home, "org/name");
    assert!(names_in(&snapshot(&home)).contains(&"model-00001-of-00001.safetensors".to_owned()));
    assert_eq!((hub.count("/model.safetensors.index.json"), hub.count("consolidated")), (1, 0));
    for name in ["../../x", "/etc/passwd", "absent"] {
        inspect(&served(name), &Dir::new(), "org/name").fails(&[&format!("found no `{name}`")]);
    }
}

#[test]
fn gguf_models_are_named_by_their_endings() {
    let gguf = |name: &str| fs::read(test_data("gguf").join(name)).unwrap();
    let mut repository = Repository::default();
    repository.add("m-Q4_K_M.gguf", gguf("qwen2.gguf"));
    repository.add("m-Q8_0.gguf", gguf("qwen3.gguf"));
    repository.add("mmproj-m-Q8_0.gguf", "not needed");
    repository.add("BF16/m-BF16-00001-of-00002.gguf", "one");
    repository.add("BF16/m-BF16-00002-of-00002.gguf", "two");
    let hub = StandIn::start(move |request, _| repository.answer(request));
    let home = Dir::new();
    let inspected = inspect(&hub, &home, "org/name:q8_0").succeeds().json();
    assert_eq!(inspected["architecture"], "qwen3");
    assert_eq!(names_in(&snapshot(&home)), ["m-Q8_0.gguf"]);
    let asked = hub.requests().len();
    inspect(&hub, &home, "org/name:Q8_0").succeeds();
    assert_eq!(hub.requests().len(), asked);
    inspect(&hub, &home, "org/name:BF16").fails(&["m-BF16-00001-of-00002.gguf"]);
    assert_eq!(names_in(&snapshot(&home).join("BF16")).len(), 2);
    inspect(&hub, &home, "org/name")
        .fails(&["has 3 GGUF models", "say which, as in `org/name:Q4_K_M`"]);
    inspect(&hub, &home, "org/name:Q2_K")
        .fails(&["no GGUF model whose name ends", "hint: it has `BF16`, `Q4_K_M`, `Q8_0`"]);
}

#[test]
fn what_is_no_model_is_named() {
    for (name, fragments) in [
        ("pytorch_model.bin", ["pickles", "or load it with transformers"]),
        ("onnx/model.onnx", ["ONNX graphs", "hint: download it with `hf download`"]),
        ("adapter_config.json", ["a LoRA adapter", "hint: merge it"]),
        ("README.md", ["no other weights", "hint: take a repository"]),
    ] {
        let mut repository = Repository::default();
        repository.add(name, "x");
        let hub = StandIn::start(move |request, _| repository.answer(request));
        inspect(&hub, &Dir::new(), "org/name").fails(&fragments);
    }
    let (hub, home) = (hub(|_, _| None), Dir::new());
    inspect(&hub, &home, "https://huggingface.co/org/name/tree/v1")
        .fails(&["an address", "hint: give `org/name@v1`"]);
    inspect(&hub, &home, "name").fails(&["`name`: there is no such file", "id, `org/name`"]);
    assert!(hub.requests().is_empty());
}

#[test]
fn provenance_names_the_commit_and_the_file_is_made_again() {
    let (hub, home, dir) = (hub(|_, _| None), Dir::new(), Dir::new());
    let out = &dir.arg("a.slim.gguf");
    let convert = ["convert", "org/name", "-o", out, "--method", "rtn", "--quiet"];
    let answer = Answer::of(&mut with_hub(&hub, &home, &convert)).succeeds();
    assert!(!answer.stderr.contains("MiB"), "{}", answer.stderr);
    let metadata = succeed(&["inspect", out, "--json", "--metadata"]).json()["metadata"].clone();
    assert_eq!(metadata["slim.source.repository"], "org/name");
    assert_eq!(metadata["slim.source.revision"], COMMIT);
    let printed = succeed(&["reproduce", out]).stdout;
    let command = format!("slimllm convert org/name@{COMMIT} -o a.slim.gguf");
    assert!(printed.starts_with(&command), "{printed}");
    fail(&["reproduce", out, "--run"], &["nor a whole model in the hub's cache"]);
    let again = Answer::of(&mut with_hub(&hub, &home, &["reproduce", out, "--run"])).succeeds();
    assert!(again.stdout.ends_with("\nthe same bytes\n"), "{}", again.stdout);
    // An output that stands in the way is told before a download.
    let asked = hub.requests().len();
    let other = ["convert", "org/other", "-o", out];
    Answer::of(&mut with_hub(&hub, &home, &other)).fails(&["exists already"]);
    assert_eq!(hub.requests().len(), asked);
    // A file of that name comes first.
    let dir = Dir::new();
    fs::create_dir(dir.path("org")).unwrap();
    fs::copy(out, dir.path("org/name")).unwrap();
    let mut inspect = with_hub(&hub, &Dir::new(), &["inspect", "org/name", "--json"]);
    let inspected = Answer::of(inspect.current_dir(dir.root())).succeeds().json();
    assert_eq!(inspected["format"], "slim", "{}", arg(dir.root()));
    assert_eq!(hub.requests().len(), asked);
}
