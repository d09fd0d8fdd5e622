//! Compiles `seccomp.json`, the system calls that the VMM may make, to the programs that
//! `src/seccomp.rs` gives to the kernel.

use std::{collections::BTreeSet, env, error::Error, fmt::Write as _, fs, path::Path};

use seccompiler::{BpfProgram, TargetArch, compile_from_json};
use serde::Deserialize;
use serde_json::{Value, json};

const POLICY: &str = "seccomp.json";

/// The lists of rules; the file itself says what they are.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Policy {
    #[serde(rename = "comment")]
    _comment: Vec<String>,
    common: Vec<Value>,
    vcpu: Vec<Value>,
    devices: Vec<Value>,
    main: Vec<Value>,
    fs: Vec<Value>,
    net: Vec<Value>,
    setup: Vec<Value>,
}

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed={POLICY}");
    let policy: Policy = serde_json::from_slice(&fs::read(POLICY)?)?;

    let mut text = String::new();
    for (name, own) in [
        ("VCPU", &policy.vcpu),
        ("DEVICES", &policy.devices),
        ("MAIN", &policy.main),
        ("FS", &policy.fs),
        ("NET", &policy.net),
    ] {
        let rules = [policy.common.as_slice(), own].concat();
        let general = unconditional(&rules);
        if let Some(rule) = rules
            .iter()
            .find(|rule| is_conditional(rule) && general.contains(call(rule)))
        {
            return Err(format!("{name} has a rule that another one makes useless: {rule}").into());
        }
        write_program(&mut text, name, &compile(&rules)?)?;
    }

    // In this order, since the rules for one call are tried in the order they come.
    let lists = [
        policy.common,
        policy.vcpu,
        policy.devices,
        policy.main,
        policy.fs,
        policy.net,
        policy.setup,
    ];
    let mut rules = lists.concat();
    // The crate takes a rule without conditions among others for none at all.
    let general: BTreeSet<String> = unconditional(&rules)
        .into_iter()
        .map(str::to_owned)
        .collect();
    rules.retain(|rule| !is_conditional(rule) || !general.contains(call(rule)));
    write_program(&mut text, "SETUP", &compile(&rules)?)?;

    let out = env::var("OUT_DIR")?;
    fs::write(Path::new(&out).join("seccomp.rs"), text)?;
    Ok(())
}

fn call(rule: &Value) -> &str {
    rule["syscall"].as_str().unwrap_or_default()
}

fn is_conditional(rule: &Value) -> bool {
    rule.get("args").is_some()
}

/// The calls that a rule allows with any arguments.
fn unconditional(rules: &[Value]) -> BTreeSet<&str> {
    rules
        .iter()
        .filter(|rule| !is_conditional(rule))
        .map(call)
        .collect()
}

fn compile(rules: &[Value]) -> Result<BpfProgram, Box<dyn Error>> {
    let filter = json!({
        "filter": { "mismatch_action": "trap", "match_action": "allow", "filter": rules }
    });
    let text = serde_json::to_vec(&filter)?;
    let mut programs = compile_from_json(text.as_slice(), TargetArch::x86_64)?;
    Ok(programs.remove("filter").ok_or("no program")?)
}

fn write_program(text: &mut String, name: &str, program: &BpfProgram) -> std::fmt::Result {
    writeln!(text, "pub(super) static {name}: &[sock_filter] = &[")?;
    for seccompiler::sock_filter { code, jt, jf, k } in program {
        writeln!(
            text,
            "    sock_filter {{ code: {code}, jt: {jt}, jf: {jf}, k: {k} }},"
        )?;
    }
    writeln!(text, "];")
}
