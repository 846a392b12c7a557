//! Conversions that ended early: they go on, and end with the same bytes.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::process::ExitStatusExt,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use crate::command::{Answer, Dir, arg, fail, succeed, tiny_model};

const OUT: &str = "out.gguf";
const WORK: &str = "out.gguf.work";

/// How often each kind of conversion is killed, at even distances; `SLIMLLM_TEST_KILLS` may say
/// otherwise.
const KILLS: u32 = 3;

/// The conversions that can be killed: with the budget, by one width, trained, and into parts.
fn conversions() -> Vec<Vec<String>> {
    let model = arg(&tiny_model("llama"));
    let words = |line: &str| -> Vec<String> {
        [model.as_str()].into_iter().chain(line.split(' ')).map(str::to_owned).collect()
    };
    vec![
        words("--samples 64 --context 128 --target-bpw 3.5"),
        words("--samples 32 --context 64 --method gptq --scales trellis"),
        words("--samples 8 --context 64 --method slim+ --steps 60"),
        words("--samples 64 --context 128 --bits 3 --split-max-size 40kB"),
    ]
}

fn convert(dir: &Dir, args: &[String]) -> Command {
    let mut command = dir.slimllm("convert");
    command.args(args).args(["-o", OUT, "--quiet"]);
    command
}

/// The files of a result, by name.
type Files = BTreeMap<String, Vec<u8>>;

/// All files in a folder, which has no others.
fn files(dir: &Dir) -> Files {
    dir.names().into_iter().map(|name| (name.clone(), fs::read(dir.path(&name)).unwrap())).collect()
}

/// What the conversion gives if nothing happens, and how long that takes.
fn undisturbed(args: &[String]) -> (Files, Duration) {
    let dir = Dir::new();
    let start = Instant::now();
    Answer::of(&mut convert(&dir, args)).succeeds();
    (files(&dir), start.elapsed())
}

/// Kills a conversion after some time; tells whether it still ran.
fn kill_after(time: Duration, command: &mut Command) -> bool {
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    std::thread::sleep(time);
    child.kill().unwrap();
    child.wait().unwrap().signal() == Some(9)
}

#[test]
fn killed_conversion_resumes_to_the_same_bytes() {
    let kills = std::env::var("SLIMLLM_TEST_KILLS").map_or(KILLS, |text| text.parse().unwrap());
    for args in conversions() {
        let (expected, time) = undisturbed(&args);
        for kill in 0..kills {
            let dir = Dir::new();
            let time = time * (2 * kill + 1) / (2 * kills);
            if kill_after(time, &mut convert(&dir, &args)) {
                // Once more, further on.
                kill_after(time, convert(&dir, &args).arg("--resume"));
            }
            Answer::of(convert(&dir, &args).args(["--resume", "--force"])).succeeds();
            assert!(files(&dir) == expected, "{args:?} after {time:?}: {:?}", dir.names());
        }
    }
}

/// A conversion that runs and has recorded something.
fn begun(dir: &Dir, args: &[String]) -> Child {
    let mut child = convert(dir, args).stderr(Stdio::piped()).spawn().unwrap();
    let records = || fs::read_dir(dir.path(WORK)).map_or(0, Iterator::count);
    // One of them says what the others are of.
    while records() < 3 {
        assert!(child.try_wait().unwrap().is_none(), "it ended before anything was recorded");
        std::thread::sleep(Duration::from_millis(1));
    }
    child
}

/// A conversion that was interrupted once something was recorded.
fn interrupted(dir: &Dir, args: &[String]) {
    let child = begun(dir, args);
    let status = Command::new("kill").args(["-s", "INT", &child.id().to_string()]).status();
    assert!(status.unwrap().success());
    let output = child.wait_with_output().unwrap();
    let talk = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(130), "{talk}");
    for fragment in ["Ctrl-C again", "interrupted", "`out.gguf.work` has what", "`--resume`"] {
        assert!(talk.contains(fragment), "`{fragment}` in\n{talk}");
    }
    assert!(!dir.path(OUT).exists());
}

#[test]
fn interrupted_conversion_finishes_its_step_and_resumes_to_the_same_bytes() {
    for args in conversions() {
        let (expected, _) = undisturbed(&args);
        let dir = Dir::new();
        interrupted(&dir, &args);
        Answer::of(convert(&dir, &args).arg("--resume")).succeeds();
        assert!(files(&dir) == expected, "{args:?}: {:?}", dir.names());
    }
}

/// Other ends than Ctrl-C tell the same: here somebody takes the name of the output meanwhile.
#[test]
fn failed_conversion_says_what_stays_and_how_to_go_on() {
    let args = &conversions()[1];
    let (expected, _) = undisturbed(args);
    let dir = Dir::new();
    let child = begun(&dir, args);
    dir.write(OUT, "mine");
    let output = child.wait_with_output().unwrap();
    let talk = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{talk}");
    for fragment in ["`out.gguf`", "`out.gguf.work` has what is done", "`--resume` goes on"] {
        assert!(talk.contains(fragment), "`{fragment}` in\n{talk}");
    }
    assert_eq!(fs::read(dir.path(OUT)).unwrap(), b"mine");
    Answer::of(convert(&dir, args).args(["--resume", "--force"])).succeeds();
    assert!(files(&dir) == expected);
    // What fails before anything is recorded leaves nothing, and says nothing of it.
    let dir = Dir::new();
    let text = dir.write("text", "too short");
    let answer = Answer::of(convert(&dir, args).args(["--calibration", &text]));
    assert_eq!((answer.code, dir.names()), (2, vec!["text".to_owned()]), "{}", answer.stderr);
    assert!(!answer.stderr.contains("what is done"), "{}", answer.stderr);
}

#[test]
fn other_settings_model_or_text_are_named_and_refused() {
    let args = &conversions()[0];
    let dir = Dir::new();
    interrupted(&dir, args);
    let text = dir.write("text.txt", "Something else, again and again. ".repeat(2000));
    let qwen = arg(&tiny_model("qwen2"));
    let resumed = |changes: &dyn Fn(&mut Vec<String>)| {
        let mut args = args.clone();
        changes(&mut args);
        Answer::of(convert(&dir, &args).arg("--resume"))
    };
    let more = |options: &'static [&str]| {
        move |args: &mut Vec<String>| {
            args.extend(options.iter().map(|&option| option.to_owned()));
        }
    };
    resumed(&more(&["--seed", "1"])).fails(&[WORK, "slim.quantization.seed", "`--force`"]);
    resumed(&more(&["--embed-bits", "8"])).fails(&["slim.quantization.embed_bits"]);
    resumed(&|args| args.extend(["--calibration".to_owned(), text.clone()]))
        .fails(&["slim.calibration.text"]);
    resumed(&|args| args[0].clone_from(&qwen)).fails(&["slim.source."]);
    // Without a word about it, nothing is thrown away and nothing mixed up.
    Answer::of(&mut convert(&dir, args)).fails(&[WORK, "`--resume` to go on", "`--force`"]);
    Answer::of(convert(&dir, args).arg("--resume")).succeeds();
}

#[test]
fn damaged_records_are_worked_out_again() {
    let args = &conversions()[0];
    let (expected, _) = undisturbed(args);
    let dir = Dir::new();
    interrupted(&dir, args);
    for entry in fs::read_dir(dir.path(WORK)).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            let mut bytes = fs::read(&path).unwrap();
            *bytes.last_mut().unwrap() ^= 1;
            fs::write(&path, bytes).unwrap();
        }
    }
    Answer::of(convert(&dir, args).arg("--resume")).succeeds();
    assert!(files(&dir) == expected);
}

#[test]
fn resume_without_a_beginning_begins_and_force_begins_anew() {
    let args = &conversions()[0];
    let dir = Dir::new();
    interrupted(&dir, args);
    let mut other = args.clone();
    other.extend(["--seed".to_owned(), "1".to_owned()]);
    Answer::of(convert(&dir, &other).arg("--force")).succeeds();
    assert_eq!(dir.names(), [OUT]);
    let model = arg(&tiny_model("llama"));
    succeed(&["convert", &model, "-o", &dir.arg("b.gguf"), "--method", "rtn", "--resume"]);
}

#[test]
fn folder_that_is_no_conversions_is_left_alone() {
    let dir = Dir::new();
    fs::create_dir(dir.path(WORK)).unwrap();
    dir.write("out.gguf.work/diary", "mine");
    let model = arg(&tiny_model("llama"));
    for option in ["--quiet", "--force", "--resume"] {
        let args = ["convert", &model, "-o", &dir.arg(OUT), "--method", "rtn", option];
        fail(&args, &[WORK, "no conversion's"]);
    }
    assert_eq!(fs::read(dir.path("out.gguf.work/diary")).unwrap(), b"mine");
}
