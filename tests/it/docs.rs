//! What the pages for users say of the command is what it does.

use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
};

use crate::command::{Dir, slimllm, succeed, tiny_model};

fn page(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn read(name: &str) -> String {
    std::fs::read_to_string(page(name)).unwrap()
}

/// The commands that `slimllm help` lists.
fn commands() -> Vec<String> {
    let help = succeed(&["help"]).stdout;
    let (_, list) = help.split_once("Commands:\n").unwrap();
    let names = list.lines().take_while(|line| !line.is_empty());
    names.filter_map(|line| Some(line.split_whitespace().next()?.to_owned())).collect()
}

/// `docs/cli.md` is what the parser says. `SLIMLLM_WRITE_DOCS=1` writes it.
#[test]
fn reference_of_all_options_is_what_help_prints() {
    let mut expected =
        "# Commands\n\nWhat `slimllm help COMMAND` prints, made by `SLIMLLM_WRITE_DOCS=1 \
                        cargo test --test it -- docs`.\n"
            .to_owned();
    for command in commands().iter().filter(|command| *command != "help") {
        let help = succeed(&["help", command]).stdout;
        let help = help.lines().map(str::trim_end).collect::<Vec<_>>().join("\n");
        let _ = write!(expected, "\n## {command}\n\n```\n{}\n```\n", help.trim_end());
    }
    if std::env::var_os("SLIMLLM_WRITE_DOCS").is_some() {
        std::fs::write(page("docs/cli.md"), &expected).unwrap();
    }
    assert!(read("docs/cli.md") == expected, "write docs/cli.md anew, as its first lines say");
}

/// Every subcommand has a line in the table of README.
#[test]
fn readme_names_every_command() {
    let readme = read("README.md");
    for command in commands().iter().filter(|command| *command != "help") {
        assert!(readme.contains(&format!("| `{command}` |")), "{command}");
    }
}

/// The commands of the guide, in a folder where its model is a tiny one.
#[test]
fn commands_of_the_guide_run() {
    let dir = Dir::new();
    dir.write("text.txt", "The quick brown fox jumps over the lazy dog. ".repeat(200));
    // The name that the guide gives to a file stands for a folder here.
    let folder = dir.path("smollm2.gguf");
    std::fs::create_dir(&folder).unwrap();
    for entry in std::fs::read_dir(tiny_model("llama")).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, folder.join(path.file_name().unwrap())).unwrap();
    }
    let guide = read("docs/guide.md");
    let lines: Vec<_> = guide.lines().filter_map(|line| line.strip_prefix("$ slimllm ")).collect();
    assert!(lines.len() >= 10);
    for line in lines.iter().filter(|line| !line.starts_with("serve ")) {
        let mut args = words(line);
        let name = args.remove(0);
        let mut command = dir.slimllm(&name);
        let answer = command.args(&args).stdin(std::process::Stdio::null());
        let answer = answer.output().unwrap();
        // `diff` of two files that differ ends with 1, as it should.
        let code = answer.status.code();
        let expected = if name == "diff" { 1 } else { 0 };
        assert_eq!(code, Some(expected), "{line}: {}", String::from_utf8_lossy(&answer.stderr));
    }
}

/// The words of a line, of which those in double quotes are one.
fn words(line: &str) -> Vec<String> {
    let quoted = line.split('"').enumerate();
    quoted
        .flat_map(|(index, part)| match index % 2 {
            1 => vec![part.to_owned()],
            _ => part.split_whitespace().map(str::to_owned).collect(),
        })
        .collect()
}

/// Files that pages link to are there.
#[test]
fn links_of_all_pages_lead_somewhere() {
    let mut pages = vec!["README.md".to_owned(), "CONTRIBUTING.md".to_owned()];
    for folder in ["docs", "docs/notes"] {
        let entries = std::fs::read_dir(page(folder)).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        pages.extend(names.filter(|n| n.ends_with(".md")).map(|n| format!("{folder}/{n}")));
    }
    for name in pages {
        let text = read(&name);
        for link in text.split("](").skip(1).filter_map(|rest| rest.split([')', '#']).next()) {
            let is_here = !link.contains("://") && !link.is_empty();
            let target = page(&name).parent().unwrap().join(link);
            assert!(!is_here || target.exists(), "{name} links to {link}");
        }
    }
}

/// The sentences that the page about trouble quotes are in the program.
#[test]
fn troubleshooting_quotes_what_the_program_says() {
    let dir = Dir::new();
    dir.write("config.json", "{ \"model_type\": \"novel\" }");
    std::fs::copy(tiny_model("llama").join("model.safetensors"), dir.path("model.safetensors"))
        .unwrap();
    for (args, quoted) in [
        (
            ["bench", "org/name"],
            "found neither a file of this name nor a whole model in the hub's cache",
        ),
        (["bench", &dir.arg("")], "model type"),
    ] {
        let answer = slimllm(&args);
        assert!(answer.stderr.contains(quoted), "{}", answer.stderr);
        assert!(read("docs/troubleshooting.md").contains(quoted));
    }
}
