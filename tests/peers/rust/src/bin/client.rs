//! A client by the Rust SDK: does what the plan in its argument says, prints what it saw as one JSON object.
use std::sync::{Arc, Mutex, atomic::{AtomicUsize, Ordering::SeqCst}};

use rmcp::{
    ClientHandler, ClientLifecycleMode, ClientServiceExt, ErrorData, RoleClient,
    model::*,
    service::{NotificationContext, RequestContext, RunningService},
    transport::{
        StreamableHttpClientTransport, TokioChildProcess, streamable_http_client::StreamableHttpClientTransportConfig,
    },
};
use serde_json::{Value, json};

#[derive(Clone, Default)]
struct Peer {
    asked: Arc<Mutex<Vec<String>>>,
    progress: Arc<AtomicUsize>,
}

impl ClientHandler for Peer {
    fn get_info(&self) -> ClientConfig {
        let capabilities = ClientCapabilities::builder().enable_elicitation().build();
        ClientConfig::new(capabilities, Implementation::new("rust", "1"))
            .with_protocol_version(ProtocolVersion::V_2025_11_25)
    }

    async fn create_elicitation(
        &self, request: ElicitRequestParams, _: RequestContext<RoleClient>,
    ) -> Result<ElicitResult, ErrorData> {
        if let ElicitRequestParams::FormElicitationParams { message, .. } = request {
            self.asked.lock().unwrap().push(message);
        }
        Ok(ElicitResult::new(ElicitationAction::Accept).with_content(json!({ "name": "Ann" })))
    }

    async fn on_progress(&self, _: ProgressNotificationParam, _: NotificationContext<RoleClient>) {
        self.progress.fetch_add(1, SeqCst);
    }
}

fn text(content: &Value) -> String {
    content.as_array().into_iter().flatten().filter_map(|c| c["text"].as_str()).collect()
}

async fn connect(plan: &Value, peer: Peer) -> Result<RunningService<RoleClient, Peer>, Box<dyn std::error::Error>> {
    let preferred_versions = vec![ProtocolVersion::V_2026_07_28];
    let mode = match plan["era"].as_str() {
        Some("legacy") => ClientLifecycleMode::Initialize,
        Some("modern") => ClientLifecycleMode::Discover { preferred_versions },
        _ => ClientLifecycleMode::Auto { preferred_versions, legacy_version: None },
    };
    if let Some(url) = plan["url"].as_str() {
        let token = plan["headers"]["Authorization"].as_str().unwrap_or_default().trim_start_matches("Bearer ");
        let config = StreamableHttpClientTransportConfig::with_uri(url).auth_header(token);
        return Ok(peer.serve_with_lifecycle(StreamableHttpClientTransport::from_config(config), mode).await?);
    }
    let argv: Vec<&str> = plan["command"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    let mut command = tokio::process::Command::new(argv[0]);
    command.args(&argv[1..]);
    Ok(peer.serve_with_lifecycle(TokioChildProcess::new(command)?, mode).await?)
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let plan: Value = serde_json::from_str(&std::env::args().nth(1).unwrap())?;
    let peer = Peer::default();
    let client = connect(&plan, peer.clone()).await?;
    let tools: Vec<_> = client.list_all_tools().await?.into_iter().map(|t| t.name).collect();
    let mut seen = json!({ "version": client.peer_info().unwrap().protocol_version, "tools": tools });
    if plan["lists"] == true {
        seen["resources"] = client.list_all_resources().await?.into_iter().map(|r| r.uri).collect();
        let note = json!(client.read_resource(ReadResourceRequestParams::new("peer://note")).await?);
        seen["note"] = json!(text(&note["contents"]));
        seen["prompts"] = client.list_all_prompts().await?.into_iter().map(|p| p.name).collect();
        let name = json!({ "name": "Ann" }).as_object().unwrap().clone();
        let greet = json!(client.get_prompt(GetPromptRequestParams::new("greet").with_arguments(name)).await?);
        seen["greet"] = greet["messages"][0]["content"]["text"].clone();
    }
    let mut calls = vec![];
    for call in plan["calls"].as_array().unwrap() {
        let params = CallToolRequestParams::new(call[0].as_str().unwrap().to_owned())
            .with_arguments(call[1].as_object().unwrap().clone());
        calls.push(match client.call_tool(params).await {
            Ok(result) => {
                let r = json!(result);
                let structured = &r["structuredContent"];
                json!({ "text": text(&r["content"]), "structured": structured, "isError": r["isError"] == true })
            }
            Err(error) => json!({ "error": error.to_string() }),
        });
    }
    client.cancel().await?;
    seen["calls"] = json!(calls);
    seen["asked"] = json!(*peer.asked.lock().unwrap());
    seen["progress"] = json!(peer.progress.load(SeqCst));
    println!("{seen}");
    Ok(())
}
