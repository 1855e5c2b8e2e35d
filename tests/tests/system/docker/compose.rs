//! Docker Compose: the first one, in Python, with Docker 20.10, else the client's plugin.

use super::{Docker, PAGE, page};
use crate::daemon::ended;
use crate::tool::{stdout, until};
use anyhow::{Result, ensure};
use std::fs;
use std::process::{Command, Stdio};

/// Where users see the last of the services.
const PUBLISHED: &str = "127.0.0.1:18081";

/// Three services in two networks: `web` asks `app`, which asks `db`, each by its name. `db` counts its starts in a named
/// volume; `app` starts once it is healthy, and fails otherwise.
fn services() -> String {
    let page = PAGE.replace('$', "$$");
    let ask = format!(
        "{page}; ask() {{ page $$(nslookup -type=a $$1 | sed -n 's/^Address: //p' | head -n 1); }}"
    );
    format!(
        r#"
services:
  db:
    image: {image}
    runtime: koya
    networks: [back]
    volumes: [count:/count]
    command:
      - sh
      - -c
      - |
        sleep 2; echo x >> /count/starts; mkdir -p /www
        echo "db $$(wc -l < /count/starts)" > /www/index.html
        exec httpd -f -p 80 -h /www
    healthcheck:
      test:
        - CMD-SHELL
        - |
          {page}
          page 127.0.0.1 | grep db
      interval: 1s
      timeout: 60s
      retries: 60
  app:
    image: {image}
    runtime: koya
    networks: [back]
    depends_on:
      db:
        condition: service_healthy
    command:
      - sh
      - -c
      - |
        {ask}
        mkdir -p /www; echo "app of $$(ask db)" > /www/index.html; grep -q db /www/index.html || exit 9
        exec httpd -f -p 80 -h /www
  web:
    image: {image}
    runtime: koya
    networks: [front, back]
    ports: ["{PUBLISHED}:80"]
    depends_on: [app]
    environment: [NAME=web]
    command:
      - sh
      - -c
      - |
        mkdir -p /www/cgi-bin; cat > /www/cgi-bin/index.cgi <<'END'
        #!/bin/sh
        {ask}
        printf 'Content-Type: text/plain\r\n\r\n'; echo "$$NAME of $$(ask app)"
        END
        chmod 755 /www/cgi-bin/index.cgi; exec httpd -f -p 80 -h /www
networks:
  front:
  back:
volumes:
  count:
"#,
        image = super::IMAGE
    )
}

/// The services answer through the published port, are started again, and are removed.
pub(super) fn services_are_composed(docker: &Docker) -> Result<()> {
    let project = Project::new(docker)?;
    fs::write(docker.dir.join("compose.yaml"), services())?;
    project.said(&["up", "-d"])?;
    let starts = |count: u32| {
        until("all services to answer", || {
            let said = page(PUBLISHED).unwrap_or_default();
            let all = format!("web of app of db {count}");
            Ok((said.lines().last() == Some(&all)).then_some(()))
        })
    };
    starts(1)?;
    let own = project.said(&["exec", "-T", "app", "uname", "-r"])?;
    ensure!(own.contains("-koya"), "{own}");
    let interfaces = project.said(&["exec", "-T", "web", "ls", "/sys/class/net"])?;
    let interfaces: Vec<_> = interfaces.split_whitespace().collect();
    ensure!(interfaces == ["eth0", "eth1", "lo"], "{interfaces:?}");
    // The health of a service is what compose waited for.
    let listed = docker.said(["ps", "--format", "{{.Names}} {{.Status}}"])?;
    let healthy = |line: &&str| line.contains("db") && line.contains("(healthy)");
    ensure!(listed.lines().filter(healthy).count() == 1, "{listed}");

    // One more container of a service, both by one name, and a single run in its network.
    project.said(&["up", "-d", "--scale", "app=2", "--no-recreate"])?;
    let script = "test $(nslookup -type=a app | grep -c '^Address: ') = 2; echo found=$?";
    let run = ["run", "--rm", "-T", "--no-deps", "app", "sh", "-c", script];
    let said = project.said(&run)?;
    ensure!(said.ends_with("found=0"), "{said}");
    project.said(&["restart", "-t", "5", "app"])?;
    starts(1)?;

    // The volume is kept until it is removed by name.
    project.said(&["down", "-t", "1"])?;
    ensure!(page(PUBLISHED).is_err(), "it still answers");
    project.said(&["up", "-d"])?;
    starts(2)?;
    project.said(&["down", "-t", "1", "-v"])?;
    let volumes = docker.said(["volume", "ls", "-q"])?;
    ensure!(volumes.is_empty(), "{volumes}");
    docker.nothing_is_left()
}

/// The client for the file `compose.yaml` of the test's directory.
struct Project<'d> {
    docker: &'d Docker,
    /// The words before its own arguments.
    client: Vec<String>,
}

impl<'d> Project<'d> {
    fn new(docker: &'d Docker) -> Result<Self> {
        let plugins = docker.tree.join("usr/libexec/docker/cli-plugins");
        let client = if plugins.exists() {
            let config = serde_json::json!({"cliPluginsExtraDirs": [plugins]});
            fs::create_dir_all(docker.dir.join(".docker"))?;
            fs::write(docker.dir.join(".docker/config.json"), config.to_string())?;
            vec!["docker".into(), "compose".into()]
        } else {
            let program = docker.tree.join("usr/bin/docker-compose");
            vec!["python3".into(), program.display().to_string()]
        };
        Ok(Self { docker, client })
    }

    /// Output of a command that must succeed.
    fn said(&self, args: &[&str]) -> Result<String> {
        let docker = self.docker;
        let packages = docker.tree.join("usr/lib/python3/dist-packages");
        let mut compose = Command::new(&self.client[0]);
        compose
            .args(&self.client[1..])
            .args(["-p", "three", "-f"])
            .arg(docker.dir.join("compose.yaml"))
            .args(args)
            .env(
                "DOCKER_HOST",
                format!("unix://{}/sock", docker.dir.display()),
            )
            .env("PATH", &docker.path)
            .env("HOME", &docker.dir)
            .env("PYTHONPATH", packages)
            .env("COMPOSE_HTTP_TIMEOUT", "600")
            .stdin(Stdio::null());
        let output = compose.output()?;
        let (_, text) = ended(&output);
        if !output.status.success() {
            let all = docker.said(["ps", "-a"]).unwrap_or_default();
            anyhow::bail!("compose {}: {text}\n{all}", args.join(" "));
        }
        stdout(output)
    }
}
