//! Outputs: what is refused, what stays as it was, and what an end before the end leaves.

use std::{
    fs,
    os::unix::{
        fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink},
        net::UnixListener,
        process::ExitStatusExt,
    },
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use sha2::{Digest, Sha256};

use crate::command::{Answer, Dir, SHORT_TEXT, arg, command, fail, slimllm, succeed, tiny_model};

/// Arguments of every command that writes, but for the output, with the extension of what it
/// writes; folders have none.
fn writing_commands(model: &str) -> Vec<(Vec<String>, &'static str)> {
    let words = |line: &str| line.split(' ').map(|word| word.replace("MODEL", model)).collect();
    vec![
        (words("convert MODEL --samples 2 --context 32 --quiet"), "gguf"),
        (words("convert MODEL --method rtn --quiet"), "gguf"),
        (words("logits MODEL --tokens 1,2,3 --device cpu"), "safetensors"),
        (words("export MODEL --quiet --to gguf"), "gguf"),
        (words("export MODEL --quiet --to safetensors"), ""),
        (words("export MODEL --quiet --to onnx"), ""),
    ]
}

fn run(args: &[String], more: &[&str]) -> Answer {
    slimllm(&args.iter().map(String::as_str).chain(more.iter().copied()).collect::<Vec<_>>())
}

/// Everything about a folder and what is in it that a command could change.
fn state(folder: &Path) -> Vec<String> {
    let mut lines = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let found = path.symlink_metadata().unwrap();
            let content = match found.file_type() {
                kind if kind.is_file() => format!("{:x}", Sha256::digest(fs::read(&path).unwrap())),
                kind if kind.is_symlink() => fs::read_link(&path).unwrap().display().to_string(),
                _ => String::new(),
            };
            let (mode, inode) = (found.mode(), found.ino());
            lines.push(format!("{} {mode:o} {inode} {} {content}", path.display(), found.rdev()));
            if found.is_dir() {
                folders.push(path);
            }
        }
    }
    lines.sort();
    lines
}

fn ended_names(extension: &str) -> impl Fn(&str) -> String {
    move |name| match extension {
        "" => name.to_owned(),
        extension => format!("{name}.{extension}"),
    }
}

/// A device that is of no harm where the test may not make one.
fn make_special_files(dir: &Dir, name: impl Fn(&str) -> String) -> Vec<(String, &'static str)> {
    let fifo = name("fifo");
    assert!(Command::new("mkfifo").arg(dir.path(&fifo)).status().unwrap().success());
    let socket = name("socket");
    drop(UnixListener::bind(dir.path(&socket)).unwrap());
    let mut made = vec![(dir.arg(&fifo), "a pipe"), (dir.arg(&socket), "a socket")];
    let device = name("device");
    let status = Command::new("mknod").arg(dir.path(&device)).args(["c", "1", "3"]).output();
    if status.is_ok_and(|output| output.status.success()) {
        assert!(dir.path(&device).metadata().unwrap().file_type().is_char_device());
        made.push((dir.arg(&device), "a device"));
    }
    for (link, target) in
        [("dangling", "nowhere"), ("linked", "precious"), ("to-null", "/dev/null")]
    {
        symlink(target, dir.path(&name(link))).unwrap();
        made.push((dir.arg(&name(link)), "a symbolic link to"));
    }
    made
}

#[test]
fn nothing_but_a_regular_file_is_ever_replaced() {
    let llama = &arg(&tiny_model("llama"));
    for (args, extension) in writing_commands(llama) {
        let dir = Dir::new();
        let name = ended_names(extension);
        dir.write("precious", "kept");
        let special = make_special_files(&dir, &name);
        let file = dir.write(&name("file"), "kept");
        let folder = dir.path(&name("folder"));
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("inner"), "kept").unwrap();
        let before = state(dir.root());

        for (path, what) in &special {
            let is_folder = extension.is_empty();
            let expected = if is_folder { "exists already" } else { what };
            run(&args, &["-o", path]).fails(&[path, expected]);
            run(&args, &["-o", path, "--force"]).fails(&[path, what]);
        }
        run(&args, &["-o", &file]).fails(&["exists already", "hint: give "]);
        for force in [&[][..], &["--force"]] {
            for (out, fragments) in [
                (arg(&folder), &["folder"][..]),
                (dir.arg(""), &["error: "]),
                ("/dev/null".to_owned(), &["`/dev/null`"]),
                ("-".to_owned(), &["stdout", "hint: "]),
                ("/dev/stdout".to_owned(), &["`/dev/stdout`"]),
            ] {
                run(&args, &[&["-o", &out][..], force].concat()).fails(fragments);
            }
        }
        assert_eq!(state(dir.root()), before, "{args:?}");
        assert!(Path::new("/dev/null").metadata().unwrap().file_type().is_char_device());
    }
}

#[test]
fn file_is_replaced_if_asked_unless_it_is_protected() {
    let llama = &arg(&tiny_model("llama"));
    for (args, extension) in writing_commands(llama) {
        let dir = Dir::new();
        let name = ended_names(extension)("out");
        let out = &dir.arg(&name);
        if extension.is_empty() {
            fs::create_dir(out).unwrap();
        } else {
            dir.write(&name, "before");
            fs::set_permissions(out, fs::Permissions::from_mode(0o444)).unwrap();
            let before = state(dir.root());
            run(&args, &["-o", out, "--force"]).fails(&["write-protected", "hint: "]);
            assert_eq!(state(dir.root()), before);
            fs::set_permissions(out, fs::Permissions::from_mode(0o644)).unwrap();
        }
        run(&args, &["-o", out, "--force"]).succeeds();
        assert_eq!(dir.names(), [name.as_str()], "{args:?}");
        let found = fs::metadata(out).unwrap();
        assert!(found.is_dir() == extension.is_empty() && found.len() > 100, "{args:?}");
    }
}

#[test]
fn source_is_not_overwritten_by_any_of_its_names() {
    let dir = Dir::new();
    let model = &dir.arg("model.gguf");
    succeed(&["export", &arg(&tiny_model("llama")), "--to", "gguf", "-o", model, "--quiet"]);
    fs::hard_link(model, dir.path("hard.gguf")).unwrap();
    fs::create_dir(dir.path("sub")).unwrap();
    let text = &dir.write("text.gguf", "calibration ".repeat(200));
    let before = state(dir.root());
    let roundabout = dir.arg("sub/../model.gguf");
    for out in [model, &dir.arg("hard.gguf"), &roundabout] {
        for force in [&[][..], &["--force"]] {
            let fragments = &["is a file of the source", "overwritten"];
            fail(&[&["convert", model, "-o", out][..], force].concat(), fragments);
            fail(&[&["export", model, "--to", "gguf", "-o", out][..], force].concat(), fragments);
        }
    }
    fail(&["convert", model, "--calibration", text, "-o", text, "--force"], &["overwritten"]);
    assert_eq!(state(dir.root()), before);
}

#[test]
fn names_that_cannot_be_are_refused_before_the_work() {
    let dir = Dir::new();
    let long = "x".repeat(300);
    let llama = &arg(&tiny_model("llama"));
    dir.write("file", "no folder");
    for (args, extension) in writing_commands(llama) {
        let other = if extension == "gguf" { "out.safetensors" } else { "out.gguf" };
        for (out, fragment) in [
            (dir.arg("new/out"), "there is no folder"),
            (dir.arg("file/out"), "is a file, no folder"),
            (dir.arg(&long), "File name too long"),
            ("/proc/out".to_owned(), "`/proc`: it cannot be written to"),
            ("/proc/self/fdinfo/out".to_owned(), "it cannot be written to"),
            (String::new(), "a value is required"),
        ] {
            run(&args, &["-o", &out]).fails(&[fragment, "error: "]);
        }
        if !extension.is_empty() {
            run(&args, &["-o", &dir.arg(other)]).fails(&["found a name that ends with", "hint: "]);
            run(&args, &["-o", &dir.arg("new/")]).fails(&["is the name of a folder", "hint: "]);
        }
        assert_eq!(dir.names(), ["file"]);
    }
}

#[test]
fn dry_run_tells_what_is_in_the_way_and_the_plan() {
    let dir = Dir::new();
    let out = &dir.write("out.gguf", "kept");
    let answer = succeed(&["convert", &arg(&tiny_model("llama")), "-o", out, "--dry-run"]);
    assert!(answer.stderr.contains("warning: ") && answer.stderr.contains("exists already"));
    assert!(answer.stdout.contains("nothing was written"), "{}", answer.stdout);
    assert_eq!(fs::read(out).unwrap(), b"kept");
}

/// Runs the command with a limit on the size of files, in the shell's blocks of 1024 bytes.
fn with_limit(blocks: u32, args: &[String], more: &[&str]) -> Answer {
    let line = format!("ulimit -f {blocks} && exec \"$@\"");
    let mut shell = Command::new("bash");
    shell.args(["-c", &line, "bash"]).arg(command(&[]).get_program()).args(args).args(more);
    Answer::of(&mut shell)
}

#[test]
fn file_beyond_the_limit_is_refused_before_the_work_and_leaves_nothing() {
    let llama = &arg(&tiny_model("llama"));
    for (args, extension) in writing_commands(llama) {
        let dir = Dir::new();
        let (name, is_small) = (ended_names(extension)("out"), args[0] == "logits");
        let blocks = if is_small { 3 } else { 30 };
        let answer = with_limit(blocks, &args, &["-o", &dir.arg(&name)]);
        answer.fails(&["the file takes", "but may have", "at most", "hint: "]);
        assert!(dir.names().is_empty(), "{args:?}: {:?}", dir.names());
    }
    // Activations in temporary files.
    let dir = Dir::new();
    let (args, _) = &writing_commands(llama)[0];
    let more = ["-o", &dir.arg("out.gguf"), "--max-memory", "2MiB", "--samples", "64"];
    let args: Vec<_> =
        args.iter().filter(|word| !["--samples", "2"].contains(&word.as_str())).cloned().collect();
    with_limit(400, &args, &more).fails(&["the file takes"]);
    assert!(dir.names().is_empty());
}

#[test]
fn full_disk_is_refused_before_the_work_with_what_is_needed_and_free() {
    // A disk of its own takes the right to mount one.
    let dir = Dir::new();
    let disk = dir.path("disk");
    fs::create_dir(&disk).unwrap();
    let llama = &arg(&tiny_model("llama"));
    let script = "mount -t tmpfs -o size=32k tmpfs \"$1\" || exit 77; disk=$1; shift; \
                  \"$@\"; code=$?; ls -A \"$disk\"; exit $code";
    for (args, extension) in writing_commands(llama) {
        if args[0] == "logits" {
            continue;
        }
        let out = disk.join(ended_names(extension)("out"));
        let mut shell = Command::new("unshare");
        shell.args(["--mount", "--map-root-user", "--user", "sh", "-c", script, "sh"]);
        shell.arg(&disk).arg(command(&[]).get_program()).args(&args).arg("-o").arg(out);
        let answer = Answer::of(&mut shell);
        if answer.code == 77 || answer.stderr.contains("unshare") {
            println!("skipped: no disk can be mounted here");
            return;
        }
        answer.fails(&["the file takes", "are free on its disk", "hint: free some space"]);
    }
}

/// Starts a conversion of a tiny model that takes long, and waits until its temporary file is
/// there.
fn long_conversion(dir: &Dir) -> std::process::Child {
    let mut child = dir
        .slimllm("convert")
        .args([&arg(&tiny_model("llama")), "-o", "out.gguf", "--samples", "4096"])
        .args(["--context", "512", "--calibration", SHORT_TEXT])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let start = Instant::now();
    let has_begun = |name: &String| fs::metadata(dir.path(name)).is_ok_and(|found| found.len() > 0);
    // Not the empty one that is made to see whether one can be made.
    while !dir.names().iter().any(has_begun) {
        assert!(start.elapsed() < Duration::from_secs(120) && child.try_wait().unwrap().is_none());
        std::thread::sleep(Duration::from_millis(5));
    }
    child
}

fn send(signal: &str, child: &std::process::Child) {
    let status = Command::new("kill").args(["-s", signal, &child.id().to_string()]).status();
    assert!(status.unwrap().success());
}

#[test]
fn interrupted_command_removes_its_files_and_says_so() {
    for (signal, code) in [("INT", 130), ("TERM", 143), ("HUP", 129)] {
        let dir = Dir::new();
        let child = long_conversion(&dir);
        assert!(dir.names()[0].starts_with(".slimllm-"), "{:?}", dir.names());
        send(signal, &child);
        if signal == "INT" {
            // The first one lets the step at hand end, which takes long.
            std::thread::sleep(Duration::from_millis(200));
            send(signal, &child);
        }
        let output = child.wait_with_output().unwrap();
        let talk = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{talk}");
        for fragment in ["interrupted", "removed the temporary `", ".slimllm-", "KiB)"] {
            assert!(talk.contains(fragment), "`{fragment}` in\n{talk}");
        }
        assert!(dir.names().is_empty(), "{:?}", dir.names());
    }
}

#[test]
fn files_of_a_killed_command_are_removed_by_the_next_one() {
    let dir = Dir::new();
    let mut child = long_conversion(&dir);
    let running = dir.names();
    // Those of a command that runs stay.
    let other = ["logits", &arg(&tiny_model("llama")), "--tokens", "1", "-o"];
    succeed(&[&other[..], &[&dir.arg("a.safetensors")]].concat());
    assert!(running.iter().all(|name| dir.names().contains(name)));
    send("KILL", &child);
    assert_eq!(child.wait().unwrap().signal(), Some(9));
    assert!(running.iter().all(|name| dir.names().contains(name)));
    let answer = succeed(&[&other[..], &[&dir.arg("b.safetensors")]].concat());
    assert!(answer.stderr.contains("which an earlier run had left"), "{}", answer.stderr);
    let mut names = dir.names();
    names.sort();
    assert_eq!(names, ["a.safetensors", "b.safetensors"]);
}

#[test]
fn command_that_is_told_to_survive_its_terminal_does() {
    let dir = Dir::new();
    let program = command(&[]).get_program().to_owned();
    let mut child = Command::new("nohup")
        .arg(program)
        .args(["convert", &arg(&tiny_model("llama")), "-o", &dir.arg("out.gguf")])
        .args(["--samples", "256", "--context", "64", "--quiet", "--calibration", SHORT_TEXT])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    while dir.names().is_empty() {
        std::thread::sleep(Duration::from_millis(5));
    }
    send("HUP", &child);
    assert!(child.wait().unwrap().success());
    assert_eq!(dir.names(), ["out.gguf"]);
}

#[test]
fn export_ends_with_the_last_block() {
    let dir = Dir::new();
    let llama = &arg(&tiny_model("llama"));
    for (layout, out) in [("gguf", "a.gguf"), ("safetensors", "b"), ("onnx", "c")] {
        let answer = succeed(&["export", llama, "--to", layout, "-o", &dir.arg(out)]);
        assert!(answer.stderr.contains("block 2 of 2: "), "{}", answer.stderr);
        assert!(!answer.stderr.contains(" 0 s left"), "{}", answer.stderr);
    }
}
