//! Images by the classic builder, whose steps run in the default runtime, and by `docker commit`.

use super::{Docker, line};
use crate::daemon::ended;
use crate::tool::stdout;
use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::Path;

const DOCKERFILE: &str = "\
FROM busybox:test
ARG WHAT=unset
COPY given /srv/given
COPY --chown=33:40 given/file /srv/owned
WORKDIR /srv/work
RUN uname -r > kernel; echo $WHAT > what; echo changed >> /srv/given/file; rm /srv/given/gone; mkdir -p a/b c; ln -s a/b link
RUN chmod 600 what; ln what hard; mv c d; mkdir c; rm -r /srv/given/sub; mkdir /srv/given/sub; touch /srv/given/sub/new; \
    chown 33:40 /srv/work; chmod u+s /srv/owned
RUN i=0; while [ $i -lt 300 ]; do i=$((i+1)); echo $i > a/b/$i; done; sync
USER 33:40
ENV TOLD=\"a b\"
RUN echo \"$(id -u):$(id -g) $TOLD $(pwd)\" > who; ls -ln /srv/owned | cut -c1-10 > mode
LABEL built=koya
EXPOSE 80
ENTRYPOINT [\"sh\", \"-c\"]
CMD [\"cat who; exit 5\"]
";

/// A build's steps run in virtual machines, their changes are in the image, and each failure has its status.
pub(super) fn images_are_built(docker: &Docker) -> Result<()> {
    let context = docker.dir.join("context");
    fs::create_dir_all(context.join("given/sub"))?;
    for (name, text) in [("file", "of the host\n"), ("gone", ""), ("sub/old", "")] {
        fs::write(context.join("given").join(name), text)?;
    }
    fs::write(context.join("Dockerfile"), DOCKERFILE)?;
    let (code, said) = built(
        docker,
        &context,
        &["-t", "built", "--build-arg", "WHAT=an argument"],
    )?;
    ensure!(code == Some(0), "{said}");
    let run = |image: &str, command: &[&str]| {
        let mut run = docker.docker(["run", "--rm", "--runtime", "koya", image]);
        run.args(command).output()
    };
    let (code, said) = ended(&run("built", &[])?);
    ensure!(code == Some(5), "{code:?} {said}");
    ensure!(said == "33:40 a b /srv/work", "{said}");
    let script = "echo kernel=$(cat kernel); echo file=$(cat /srv/given/file); echo given=$(ls /srv/given /srv/given/sub)
        echo work=$(ls -1 | tr '\\n' ' '); echo link=$(readlink link); echo count=$(ls a/b | wc -l)
        echo what=$(stat -c '%A %h' what); test what -ef hard && echo hard=same
        echo owned=$(ls -ln /srv/owned | cut -c1-10) $(stat -c %u:%g /srv/owned) $(stat -c %u:%g .)";
    let said = stdout(run("built", &[script])?)?;
    ensure!(line(&said, "kernel")?.contains("-koya"), "{said}");
    let expected = [
        ("file", "of the host changed"),
        ("given", "/srv/given: file sub /srv/given/sub: new"),
        ("work", "a c d hard kernel link mode what who"),
        ("link", "a/b"),
        ("count", "300"),
        ("what", "-rw------- 2"),
        ("hard", "same"),
        ("owned", "-rwSr--r-- 33:40 33:40"),
    ];
    for (name, value) in expected {
        ensure!(line(&said, name)? == value, "{name} is not {value}: {said}");
    }

    // The same build again runs nothing; another argument runs the steps from its use on.
    let (code, said) = built(docker, &context, &["--build-arg", "WHAT=an argument"])?;
    ensure!(code == Some(0) && !said.contains("Running in"), "{said}");
    // A step that fails: its status, and no container is left.
    fs::write(
        context.join("Dockerfile"),
        "FROM busybox:test\nRUN echo said; exit 9\n",
    )?;
    let (code, said) = built(docker, &context, &["--rm", "--force-rm"])?;
    ensure!(code == Some(9), "{code:?} {said}");
    ensure!(
        said.contains("\nsaid\n") && said.contains("non-zero code: 9"),
        "{said}"
    );
    // Options of steps: memory, networks.
    fs::write(
        context.join("Dockerfile"),
        "FROM busybox:test\nRUN echo limit=$(cat /sys/fs/cgroup/memory.max); echo net=$(ls /sys/class/net)\n",
    )?;
    let (code, said) = built(docker, &context, &["-m", "200m", "--network", "none"])?;
    ensure!(code == Some(0), "{said}");
    ensure!(
        line(&said, "limit")? == "209715200" && line(&said, "net")? == "lo",
        "{said}"
    );

    // A container that runs becomes an image, with changes to its configuration.
    let script = "echo kept > /kept; rm /etc/passwd; mkdir /mem/sub; echo up; exec sleep 1000";
    let options = ["-d", "--name", "source", "--tmpfs", "/mem"];
    stdout(docker.run(&options, &["sh", "-c", script]).output()?)?;
    crate::tool::until("the container", || {
        Ok((docker.said(["logs", "source"])? == "up").then_some(()))
    })?;
    let changes = [
        "commit",
        "-c",
        "CMD [\"cat\", \"/kept\"]",
        "-c",
        "ENV A=b",
        "source",
        "kept",
    ];
    docker.said(changes)?;
    ensure!(docker.inspect("source", "{{.State.Status}}")? == "running");
    docker.said(["rm", "-f", "source"])?;
    ensure!(stdout(run("kept", &[])?)? == "kept");
    let said = stdout(run(
        "kept",
        &["sh", "-c", "echo $A; ls /etc/passwd /mem 2>&1"],
    )?);
    let said = format!("{said:?}");
    ensure!(
        said.contains("b") && said.contains("/etc/passwd: No such"),
        "{said}"
    );
    docker.nothing_is_left()
}

/// `docker build OPTIONS CONTEXT` by the classic builder.
fn built(docker: &Docker, context: &Path, options: &[&str]) -> Result<(Option<i32>, String)> {
    let mut build = docker.docker(["build"]);
    build.args(options).arg(context);
    let output = build.env("DOCKER_BUILDKIT", "0").output();
    Ok(ended(&output.context("docker build")?))
}
