// Commands and programs that query a model on this server.

import { pathOf } from "./api.js";

const KEY = '-H "Authorization: Bearer $OPENAI_API_KEY"';

/** Return `{name, about, code}` for a model of `GET /api/v1/models/ID`; `storedId` is its id in the CLI, or null. */
export function snippets({ origin, model, storedId }) {
  const { does = [], reads = ["text"], reads_prompts: prompts } = model.abilities ?? {};
  const path = pathOf("models", model.id);
  const curl = (operation, ...more) => curlCommand(`${origin}${path}/${operation}`, ...more);
  const found = [];
  if (does.includes("write")) found.push(...writing(origin, model));
  if (does.includes("embed") && reads.includes("text")) found.push(...embedding(origin, model));
  else if (does.includes("embed")) found.push(snippet("curl", predicting(curl, reads[0])));
  if (does.includes("predict")) found.push(snippet("curl", predicting(curl, reads[0])));
  if (does.includes("make_images")) {
    const body = prompts ? '{"count": 4, "prompt": "a red star"}' : '{"count": 4}';
    const code = curl("images", ["-H 'Accept: image/png' --output images.png"], body);
    found.push(snippet("curl: new images", code, "Without the Accept header, the response contains each image in base64."));
  }
  if (does.includes("reconstruct")) {
    const code = curl("reconstructions", ["-H 'Accept: image/png' --output back.png"], "@image.png", "image/png");
    found.push(snippet("curl: reconstructed images", code));
  }
  const command = storedId ? commandOf(does, reads, storedId) : null;
  if (command) found.push(snippet("CLI", command, "Run the command on the machine of the server with its LUTHIER_HOME."));
  return found;
}

/** Return `text` as one word of a shell. */
export function shellWord(text) {
  return /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
}

/** Return `text` as a string of Python. */
export const pythonString = (text) => JSON.stringify(text).replaceAll("\u007f", "\\u007f");

const snippet = (name, code, about = "") => ({ name, about, code });

function curlCommand(url, more, body, media = "application/json") {
  const data = body.startsWith("@") ? `--data-binary ${body}` : `-d ${shellWord(body)}`;
  return [`curl ${shellWord(url)}`, `${KEY} -H "Content-Type: ${media}"`, ...more, data].join(" \\\n  ");
}

function openaiClient(origin, ...lines) {
  const code = ["from openai import OpenAI", "", `client = OpenAI(base_url=${pythonString(`${origin}/v1`)})`, ...lines];
  return snippet("openai client", code.join("\n"), "pip install openai; the client reads the key from OPENAI_API_KEY.");
}

function writing(origin, model) {
  const turns = '[{"role": "user", "content": "Hello"}]';
  const body = `{"model": ${JSON.stringify(model.id)}, "messages": ${turns}, "max_tokens": 200, "temperature": 0}`;
  return [
    openaiClient(
      origin,
      "answer = client.chat.completions.create(",
      `    model=${pythonString(model.id)},`,
      `    messages=${turns},`,
      "    max_tokens=200,",
      "    temperature=0,",
      ")",
      "print(answer.choices[0].message.content)",
    ),
    snippet("curl", curlCommand(`${origin}/v1/chat/completions`, [], body)),
    snippet("boto3", boto3(origin, model), "pip install boto3; the client reads AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."),
  ];
}

function boto3(origin, { id, name, arn, kind, deployed: isDeployed }) {
  const region = arn.split(":")[3] || "us-east-1";
  const isCustom = kind === "custom" && !isDeployed;
  const deployed = `
bedrock = boto3.client("bedrock", **server)
deployment = bedrock.create_custom_model_deployment(  # once: Bedrock deploys custom models before they are used
    modelDeploymentName=${pythonString(name)},
    modelArn=${pythonString(arn)},
)["customModelDeploymentArn"]
while (
    bedrock.get_custom_model_deployment(customModelDeploymentIdentifier=deployment)["status"]
    == "Creating"
):
    time.sleep(1)`;
  return `${isCustom ? "import time\n" : ""}import boto3

server = {"endpoint_url": ${pythonString(origin)}, "region_name": ${pythonString(region)}}${isCustom ? deployed : ""}
runtime = boto3.client("bedrock-runtime", **server)
answer = runtime.converse(
    modelId=${isCustom ? "deployment" : pythonString(id)},
    messages=[{"role": "user", "content": [{"text": "Hello"}]}],
    inferenceConfig={"maxTokens": 200, "temperature": 0},
)
print(answer["output"]["message"]["content"][0]["text"])`;
}

function embedding(origin, model) {
  const texts = '["a text", "another"]';
  return [
    openaiClient(
      origin,
      `answer = client.embeddings.create(model=${pythonString(model.id)}, input=${texts})`,
      "print(len(answer.data), len(answer.data[0].embedding))",
    ),
    snippet("curl", curlCommand(`${origin}/v1/embeddings`, [], `{"model": ${JSON.stringify(model.id)}, "input": ${texts}}`)),
  ];
}

function predicting(curl, kind) {
  if (kind === "image") return curl("predictions", [], "@image.png", "image/png");
  if (kind === "audio") return curl("predictions", [], "@audio.wav", "audio/wav");
  const input = kind === "window" ? '{"window": [1.0, 1.2, 0.9]}' : '{"text": "Where is my card?"}';
  return curl("predictions", [], `{"inputs": [${input}]}`);
}

function commandOf(does, reads, storedId) {
  const id = shellWord(storedId);
  if (does.includes("write")) return `luthier generate ${id} "Hello"\nluthier chat ${id}`;
  if (does.includes("embed")) return `luthier embed ${id} rows.jsonl --output vectors.npy`;
  if (does.includes("predict") && reads[0] === "text") return `luthier predict ${id} "Where is my card?"`;
  if (does.includes("make_images")) return `luthier sample ${id} --output images`;
  return does.includes("predict") ? `luthier predict ${id} FILE` : null;
}
