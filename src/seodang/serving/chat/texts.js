// Every text of the page, in English and Korean; the browser's language chooses.

const TEXTS = {
  en: {
    new: "New conversation",
    welcome: "What would you like to know?",
    examples: "Example questions",
    conversation: "Conversation",
    question: "Your question",
    placeholder: "Ask a question",
    send: "Send",
    stop: "Stop answering",
    caution: "A small specialised model: check what matters. Your words stay on the machine that serves this page.",
    parameters: (count) => `${count} parameters`,
    user: "You:",
    assistant: "The model:",
    answering: "Answering…",
    answered: "The answer is complete.",
    stopped: "You stopped this answer.",
    started: "New conversation.",
    cutOff: "Cut off: the answer reached its longest length.",
    empty: "The model gave no answer.",
    speed: (tokens, rate) => `${tokens} tokens, ${rate.toFixed(0)} per second`,
    retry: "Try again",
    tooLong: "This conversation is longer than the model can read. Start a new one, or ask something shorter.",
    refused: (reason) => `The model could not answer: ${reason}`,
    unreachable: "The model does not answer. Check that its server is still running.",
  },
  ko: {
    new: "새 대화",
    welcome: "무엇을 도와드릴까요?",
    examples: "질문 예시",
    conversation: "대화",
    question: "질문",
    placeholder: "질문을 입력하세요",
    send: "보내기",
    stop: "답변 멈추기",
    caution: "작은 전문 모델입니다. 중요한 내용은 꼭 확인하세요. 입력한 내용은 이 페이지를 제공하는 서버 밖으로 나가지 않습니다.",
    parameters: (count) => `매개변수 ${count} 개`,
    user: "나:",
    assistant: "모델:",
    answering: "답변하는 중…",
    answered: "답변이 끝났습니다.",
    stopped: "답변을 멈췄습니다.",
    started: "새 대화를 시작합니다.",
    cutOff: "답변이 최대 길이에 이르러 잘렸습니다.",
    empty: "모델이 답변하지 않았습니다.",
    speed: (tokens, rate) => `${tokens}토큰, 초당 ${rate.toFixed(0)}토큰`,
    retry: "다시 시도",
    tooLong: "대화가 모델이 읽을 수 있는 길이를 넘었습니다. 새 대화를 시작하거나 더 짧게 질문하세요.",
    refused: (reason) => `모델이 답변하지 못했습니다: ${reason}`,
    unreachable: "모델이 응답하지 않습니다. 서버가 실행 중인지 확인하세요.",
  },
};

const language = navigator.language.startsWith("ko") ? "ko" : "en";

/** The text of this name; some are functions of what they mention. */
export function text(name) {
  return TEXTS[language][name];
}

/** A large number as people say it: 135M, 1.35억. */
export function count(value) {
  return new Intl.NumberFormat(language, { notation: "compact", maximumSignificantDigits: 3 }).format(value);
}

/** Put the reader's language into the page. */
export function translate() {
  document.documentElement.lang = language;
  for (const node of document.querySelectorAll("[data-text]")) node.textContent = text(node.dataset.text);
  for (const node of document.querySelectorAll("[data-label]")) node.ariaLabel = text(node.dataset.label);
  for (const node of document.querySelectorAll("[data-placeholder]")) node.placeholder = text(node.dataset.placeholder);
}
